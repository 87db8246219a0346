/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The maps of services: which address stands for which backends, and which connection was given which of them.
 *
 * See docs/adr/0011-services.md. A change of a service's backends writes a new set under a new number, then points the
 * frontends at it, one atomic write each, and frees the old set a second later: no packet sees a set that is half written or half gone.
 */
#pragma once
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include "addr.h"

/* Who asks: the two may have different backends (externalTrafficPolicy, internalTrafficPolicy). */
enum frontend_scope {
	FRONTEND_CLUSTER = 0,  /* pods and processes of nodes */
	FRONTEND_EXTERNAL = 1, /* whatever arrives at the node from outside the cluster */
};

struct frontend_key {
	union addr addr; /* ::ffff:0.0.0.0 or :: stand for every address of a node (node ports, host ports) */
	__be16 port;
	__u8 protocol; /* 0 with port 0: an address that has services, asked for a port or protocol that it does not have */
	__u8 scope; /* enum frontend_scope */
	__u32 zero;
};
_Static_assert(sizeof(struct frontend_key) == 24, "struct frontend_key has no implicit padding");

enum frontend_flag {
	FRONTEND_AFFINITY = 1 << 0, /* a client stays with its backend for `affinity` seconds */
	FRONTEND_MAGLEV = 1 << 1,   /* the set has a table in `maglev`; else a slot is drawn */
	FRONTEND_SOURCE_RANGES =
		1 << 2, /* only for clients in `source_ranges`; sockets leave it to tc, which knows the client */
	FRONTEND_DROP = 1 << 3,  /* without a backend: dropped, since another node may have one; else rejected */
	FRONTEND_LOCAL = 1 << 4, /* every backend is on this node: the client's address is kept */
	FRONTEND_DSR = 1 << 5,   /* a backend on another node answers the client itself */
	FRONTEND_SKIPS = 1 << 6, /* clients in `skips` pass it by (skipRedirectFromBackend) */
	FRONTEND_HERE =
		1 << 7, /* of the unspecified address: at this node's addresses, not at other nodes' (host ports) */
};

struct frontend {
	__u32 service;  /* of a port of an owner, in one IP version: affinity, source ranges, events; from 1 */
	__u32 set;      /* backends, in `slots` and `maglev` */
	__u32 count;    /* slots of the set; 0: there is no backend */
	__u32 affinity; /* seconds */
	__u32 flags;    /* enum frontend_flag */
	__u32 spare[3];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 524288);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct frontend_key);
	__type(value, struct frontend);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} frontends SEC(".maps");

enum backend_flag {
	BACKEND_LOCAL = 1 << 0,       /* a pod of this node, or this node */
	BACKEND_TERMINATING = 1 << 1, /* keeps its connections; gets new ones only where there is no other */
};

/* One address, port and protocol has one number, as long as any set has it. */
struct backend {
	union addr addr;
	__be16 port;
	__u8 protocol;
	__u8 flags; /* enum backend_flag */
	__u32 spare;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 524288);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32); /* from 1 */
	__type(value, struct backend);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} backends SEC(".maps");

#define SLOT_MEMBER (1U << 31) /* | backend number: says that a set with affinity has it; the value is the number */

struct slot_key {
	__u32 set;
	__u32 slot; /* 0..count - 1; a backend of weight w stands in w slots */
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1048576);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct slot_key);
	__type(value, __u32); /* backend number */
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} slots SEC(".maps");

#define MAGLEV_CHUNK 128

struct maglev_key {
	__u32 set;
	__u32 chunk; /* position in the table / MAGLEV_CHUNK */
};

struct maglev_chunk {
	__u16 slot[MAGLEV_CHUNK];
};

/* Maglev tables (Eisenbud et al., NSDI 2016) of `maglev_size` positions, made of backends' addresses, so every node has the
 * same. In chunks: a table is a few batched writes and takes room only where it is asked for.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1048576);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct maglev_key);
	__type(value, struct maglev_chunk);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} maglev SEC(".maps");

struct affinity_key {
	union addr client; /* of a packet: its source; of a socket: its network namespace's cookie in d[1] */
	__u32 service;
	__u32 socket; /* 1: a socket's */
};

struct affinity {
	__u64 used; /* expiry_clock() at its last new connection */
	__u32 backend;
	__u32 pad;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct affinity_key);
	__type(value, struct affinity);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} affinities SEC(".maps");

struct source_range_key {
	__u32 prefixlen; /* 32 + 0..128, IPv4 /n is 32 + 96 + n */
	__u32 service;
	union addr addr;
} __attribute__((packed, aligned(4)));

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct source_range_key);
	__type(value, __u32); /* 1 */
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} source_ranges SEC(".maps");

/* A client that a redirect passes by. */
struct skip_key {
	__u64 netns;     /* cookie of the client's network namespace */
	union addr addr; /* the frontend's */
	__be16 port;
	__u8 protocol;
	__u8 pad[5];
};
_Static_assert(sizeof(struct skip_key) == 32, "struct skip_key has no implicit padding");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct skip_key);
	__type(value, __u32); /* 1 */
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} skips SEC(".maps");

/* ---- connections that were translated -------------------------------------------------------------------------- */

enum translation_dir {
	TRANSLATION_OUT = 0,  /* client to frontend */
	TRANSLATION_BACK = 1, /* backend to client */
};

/* `peer`: the frontend (OUT) or the backend (BACK). The client's address is its own; but in BACK of a hairpin it is the
 * gateway, as the backend sees it.
 */
struct translation_key {
	union addr client;
	union addr peer;
	__be16 client_port;
	__be16 peer_port;
	__u8 protocol;
	__u8 dir; /* enum translation_dir */
	__u16 pad;
};

enum translation_flag {
	TRANSLATION_SNAT = 1 << 0, /* the client's address became this node's: its mapping is in `nat` */
	TRANSLATION_DSR = 1 << 1,  /* the backend's node answers the client itself */
	TRANSLATION_HAIRPIN =
		1 << 2,             /* client and backend are one pod: the client's address became the pods' gateway */
	TRANSLATION_LOCAL = 1 << 3, /* the backend is a pod of this node, or this node */
};

/* Both rows of a translated connection; either may be evicted, the next packet of the client makes it anew. */
struct translation {
	union addr addr; /* OUT: the backend's; BACK: the frontend's */
	__be16 port;
	__u16 pad;
	__u32 flags;   /* enum translation_flag */
	__u32 state;   /* enum ct_flag: what was seen of the connection's end */
	__u32 backend; /* its number */
	__u32 service;
	__be32 via;    /* OUT, IPv4: the next hop to the backend as of this second, 0: not known */
	__u64 expires; /* expiry_clock() */
};
_Static_assert(sizeof(struct translation) == 48, "struct translation has no implicit padding");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 262144);
	__type(key, struct translation_key);
	__type(value, struct translation);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} translations SEC(".maps");

/* What a socket was connected or sent to, for getpeername() and recvmsg(). */
struct socket_peer_key {
	__u64 socket;    /* cookie */
	union addr addr; /* the backend's */
	__be16 port;
	__u8 protocol;
	__u8 pad[5];
};
_Static_assert(sizeof(struct socket_peer_key) == 32, "struct socket_peer_key has no implicit padding");

struct socket_peer {
	union addr addr; /* the frontend's */
	__be16 port;
	__u16 pad;
	__u32 service;
	__u32 backend;
	__u32 spare;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 131072);
	__type(key, struct socket_peer_key);
	__type(value, struct socket_peer);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} socket_peers SEC(".maps");

/* Which backend an unconnected UDP socket's datagrams to a frontend go to: the same as long as they go on, as if it
 * were a connection.
 */
struct socket_flow {
	union addr addr; /* the backend's */
	__be16 port;
	__u16 pad;
	__u32 service;
	__u32 backend;
	__u32 spare;
	__u64 used; /* expiry_clock(), to a second */
};
_Static_assert(sizeof(struct socket_flow) == 40, "struct socket_flow has no implicit padding");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct socket_peer_key); /* with the frontend's address and port */
	__type(value, struct socket_flow);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} socket_flows SEC(".maps");
