/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Every map of the datapath and the layout of its rows; those of services are in service_maps.h.
 *
 * These two files are the only place where a layout is defined: Python reads sizes, offsets and names from the object's
 * BTF. All maps are pinned by name below the agent's bpffs and outlive it. A change of a layout raises
 * SCHEMA_VERSION (see docs/adr/0005-pins-and-upgrades.md).
 */
#pragma once
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include "addr.h"
#include "service_maps.h"

#define SCHEMA_VERSION 1

enum direction { DIR_EGRESS = 0, DIR_INGRESS = 1, DIR_MAX = 2 };

/* ---- endpoints -------------------------------------------------------------------------------------------- */

enum endpoint_option {
	EP_OPT_AUDIT = 1 << 0, /* policy verdicts are reported, not enforced */
	EP_OPT_HOST = 1 << 1,  /* the node itself, not a pod; the map `exemptions` goes before its policies */
};

/* A local pod, keyed by the ifindex of its host-side interface; or the node itself (EP_OPT_HOST), keyed by the ifindex of
 * the host device. The node's row decides nothing while both its policy ids are 0.
 */
struct endpoint {
	__u32 id; /* endpoint id, 1..65535 */
	__u32 identity;
	__u32 policy[DIR_MAX]; /* policy id by direction; 0: no policy selects it, all is allowed */
	union addr v4;         /* zero: it has none */
	union addr v6;
	__u64 since;   /* epoch at which it got its addresses: older conntrack rows are a former owner's */
	__u32 ifindex; /* host-side interface, the map's key */
	__u32 options; /* enum endpoint_option */
	__u16 mtu;
	__u8 mac[6];    /* of the interface inside the pod */
	__u8 gw_mac[6]; /* of the host-side interface: what ARP and ND answer for the gateway */
	__u16 pad;
	__u64 netns; /* cookie of its network namespace, 0: not known; for `skips` */
	__u32 spare[2];
};
_Static_assert(sizeof(struct endpoint) == 96, "struct endpoint has no implicit padding");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct endpoint);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} endpoints SEC(".maps");

enum local_addr_flag {
	LOCAL_HOST = 1 << 0, /* an address of this node itself */
};

/* Addresses that live on this node: of pods (ifindex set) and of the node (LOCAL_HOST). */
struct local_addr {
	__u32 ifindex;
	__u32 flags;
	__u8 macs[12]; /* Ethernet destination and source of a frame to the pod: `mac` and `gw_mac` of its endpoint */
	__u32 pad;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, union addr);
	__type(value, struct local_addr);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} local_addrs SEC(".maps");

/* ---- the node itself -------------------------------------------------------------------------------------- */

/* Connections of the node that no node policy judges, so that a policy cannot cut the node off. */
struct exemption {
	union addr peer; /* zero: any */
	__be16 port;     /* the connection's destination port, or the ICMP type */
	__u8 protocol;
	__u8 direction; /* enum direction, of the connection as the node sees it */
	__u32 zero;
};
_Static_assert(sizeof(struct exemption) == 24, "struct exemption has no implicit padding");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct exemption);
	__type(value, __u32);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} exemptions SEC(".maps");

/* ---- ipcache ---------------------------------------------------------------------------------------------- */

struct ipcache_key {
	__u32 prefixlen; /* 0..128, IPv4 /n is 96 + n */
	union addr addr; /* right behind: the trie compares from there, padding too */
} __attribute__((packed, aligned(4)));
_Static_assert(sizeof(struct ipcache_key) == 20, "struct ipcache_key has no padding");

enum ipcache_flag {
	IPCACHE_NODE = 1 << 0, /* an address of a cluster node: a source the overlay trusts */
	IPCACHE_POD = 1 << 1,  /* an address of a managed pod: it may not arrive from the underlay unencapsulated */
};

struct ipcache_entry {
	__u32 identity;
	__u32 flags;       /* enum ipcache_flag */
	union addr tunnel; /* underlay address of the node that has it; zero: not reached by tunnel */
	__u8 key;          /* encryption key index, 0: none */
	__u8 pad[3];
	__u32 spare[3];
};
_Static_assert(sizeof(struct ipcache_entry) == 40, "struct ipcache_entry has no implicit padding");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 512000);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct ipcache_key);
	__type(value, struct ipcache_entry);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} ipcache SEC(".maps");

/* Identities the agent knows; any other number is "unknown", which is not "nobody". */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 131072);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, __u32);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} identities SEC(".maps");

/* ---- policy ----------------------------------------------------------------------------------------------- */

/* Where an identity belongs, told by its number alone. */
enum scope {
	SCOPE_RESERVED = 0, /* 1..255 but world */
	SCOPE_CLUSTER = 1,  /* own cluster's, 256..65535 with the own cluster id above */
	SCOPE_MESH = 2,     /* another cluster's */
	SCOPE_WORLD = 3,    /* world (2, 9, 10) and node-local CIDR and FQDN identities, 1<<24 */
	SCOPE_NODE = 4,     /* remote nodes with an identity of their own, 2<<24 */
	SCOPE_MAX = 5,
};

/* One direction of one resolved policy; shared by all endpoints that resolve alike. Class 0 has no rows. */
struct policy {
	__u32 default_rule; /* rule id reported when nothing matched: names who imposed default deny */
	__u32 flags;
	__u32 classes[SCOPE_MAX]; /* default class of a known identity, by scope */
	__u32 unknown[SCOPE_MAX]; /* class of an identity that is not in the identities map, by scope */
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32); /* policy id, from 1; a policy id without a row denies (fail closed) */
	__type(value, struct policy);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} policies SEC(".maps");

struct class_key {
	__u32 policy;
	__u32 identity;
};

/* Identities whose class differs from their scope's default. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1048576);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct class_key);
	__type(value, __u32); /* class id */
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} policy_classes SEC(".maps");

/* Longest prefix wins: class alone (32 bits) matches any protocol, + protocol (48), + leading bits of the port (..64).
 * ICMP and ICMPv6 types stand where the port stands.
 */
struct row_key {
	__u32 prefixlen;
	__u32 class;
	__u8 protocol;
	__u8 zero;
	__be16 port;
};

enum row_verdict { ROW_DENY = 1, ROW_ALLOW = 2, ROW_REDIRECT = 3 };

/* The final answer, precedence already flattened. A miss in a class asks the scope's default class; a miss there denies. */
struct row {
	__u8 verdict; /* enum row_verdict */
	__u8 pad[3];
	__u32 l7;   /* rule set id for ROW_REDIRECT, else 0 */
	__u32 rule; /* rule id that decided */
};

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 1048576);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct row_key);
	__type(value, struct row);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} policy_rows SEC(".maps");

/* Where the proxy listens for a rule set. No row: the proxy is not ready, packets are dropped. */
struct listener {
	__be16 port; /* on 127.0.0.1 and ::1, transparent */
	__u16 pad;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32); /* rule set id */
	__type(value, struct listener);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} listeners SEC(".maps");

/* Revocation: the agent adds one after all rows of a change are written; programs read it before any look-up. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} epoch SEC(".maps");

/* ---- conntrack -------------------------------------------------------------------------------------------- */

enum ct_leg { LEG_DIRECT = 0, LEG_PROXY = 1 /* proxy to server */ };

/* One row a connection: the ends are in canonical order, (a, aport) <= (b, bport). */
struct ct_key {
	union addr a;
	union addr b;
	__be16 aport;
	__be16 bport;
	__u8 protocol;
	__u8 leg;  /* enum ct_leg */
	__u8 echo; /* ICMP echo: 1: end a asks, 2: end b does. Two ends that ask each other have a row each. */
	__u8 pad;
};

enum ct_flag {
	CT_ORIG_B = 1 << 0, /* the originator is end b */
	CT_SEEN_REPLY = 1 << 1,
	CT_FIN_ORIG = 1 << 2,
	CT_FIN_REPLY = 1 << 3,
	CT_RST = 1 << 4,
	CT_PROXIED = 1 << 5, /* leg to the proxy: the server's side of it is the proxy's socket */
	CT_DENIED = 1 << 6,  /* was allowed, a newer policy denies: both directions are dropped */
	CT_TUNNEL = 1 << 7,  /* came in by the overlay: replies go back that way, also to nodes */
	CT_SERVICE = 1 << 8, /* the originator asked a frontend: `translations` has which */
	CT_DSR = 1 << 9,     /* came from the node that was asked; the answers go to the client straight */
};

struct ct_entry {
	__u64 expires;    /* expiry_clock() */
	__u64 epoch;      /* at which the verdict was decided */
	__u64 sender[2];  /* sender_word() of the pod that may send each direction, 0: none was seen */
	__u64 packets[2]; /* original direction, reply direction */
	__u64 bytes[2];
	__u32 flags;       /* enum ct_flag */
	__u32 l7;          /* rule set id if CT_PROXIED */
	__u64 born;        /* epoch at which the row was made */
	__u32 identity[2]; /* originator's, responder's */
	__u32 rule
		[DIR_MAX]; /* that decided the originator's egress, the responder's ingress; 0: that end is not here */
};
_Static_assert(sizeof(struct ct_entry) == 96, "struct ct_entry has no implicit padding");

/* Connections that have seen both directions, and those that took the place of one that did; a flood of half-open ones cannot push them out. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 262144);
	__type(key, struct ct_key);
	__type(value, struct ct_entry);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} ct SEC(".maps");

/* Other connections that have seen one direction only. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct ct_key);
	__type(value, struct ct_entry);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} ct_new SEC(".maps");

/* ---- masquerade ------------------------------------------------------------------------------------------- */

enum nat_dir { NAT_OUT = 0, NAT_IN = 1 };

/* NAT_OUT: inner = the pod's address and port; NAT_IN: inner = the node's address and port. peer = the far end. */
struct nat_key {
	union addr inner;
	union addr peer;
	__be16 inner_port; /* ICMP: the echo identifier, for both ports */
	__be16 peer_port;
	__u8 protocol;
	__u8 dir; /* enum nat_dir */
	__u16 pad;
};

struct nat_entry {
	union addr addr; /* NAT_OUT: the node's; NAT_IN: the pod's */
	__be16 port;
	__u16 pad;
	__u32 spare;
	__u64 expires; /* expiry_clock() */
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 131072);
	__type(key, struct nat_key);
	__type(value, struct nat_entry);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} nat SEC(".maps");

/* ---- fragments -------------------------------------------------------------------------------------------- */

struct frag_key {
	union addr saddr;
	union addr daddr;
	__be32 id;     /* IPv4: 16 bits */
	__u8 protocol; /* IPv6: 0, the datagram is named by the rest (RFC 8200, 4.5) */
	__u8 pad[3];
};

struct frag_entry {
	__be16 sport;
	__be16 dport;
	__u8 protocol;  /* IPv6: behind all extension headers */
	__u8 icmp_type; /* of an echo */
	__u8 pad[2];
	__u64 expires;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 8192);
	__type(key, struct frag_key);
	__type(value, struct frag_entry);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} fragments SEC(".maps");

/* ---- what happened ---------------------------------------------------------------------------------------- */

struct counter {
	__u64 packets;
	__u64 bytes;
};

/* Index: 2 * reason + direction; reason 0 is "forwarded", the rest is enum drop_reason. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 512);
	__type(key, __u32);
	__type(value, struct counter);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} counters SEC(".maps");

enum event_type {
	EVENT_VERDICT = 1, /* a policy decision on a connection's first packet, or a decision made anew */
	EVENT_DROP = 2,
	EVENT_END = 3,    /* a connection ended (FIN both ways or RST): packets and bytes are its totals */
	EVENT_SOCKET = 4, /* a socket was given a backend; its source is not known yet */
};

enum event_verdict { VERDICT_DROPPED = 0, VERDICT_FORWARDED = 1, VERDICT_REDIRECTED = 2, VERDICT_AUDIT = 3 };

enum observation {
	OBS_FROM_POD = 1,
	OBS_FROM_HOST = 2,
	OBS_FROM_OVERLAY = 3,
	OBS_FROM_NETDEV = 4,
	OBS_TO_NETDEV = 5,
	OBS_SOCKET = 6,
};

enum ct_state { CT_STATE_NEW = 0, CT_STATE_ESTABLISHED = 1, CT_STATE_REPLY = 2, CT_STATE_RELATED = 3 };

/* One fixed-size record of what was decided; nothing is parsed again in user space. */
struct event {
	__u64 time; /* bpf_ktime_get_boot_ns() */
	union addr saddr;
	union addr daddr;
	__be16 sport; /* ICMP: the type; the identifier stands in dport */
	__be16 dport;
	__u8 protocol;
	__u8 type;        /* enum event_type */
	__u8 verdict;     /* enum event_verdict */
	__u8 reason;      /* enum drop_reason, 0: none */
	__u8 direction;   /* enum direction that decided */
	__u8 observation; /* enum observation */
	__u8 ct_state;    /* enum ct_state */
	__u8 tcp_flags;
	__u32 identity[2];   /* source's, destination's */
	__u32 endpoint[2];   /* ids of the local ends, 0: not here */
	__u32 rule[DIR_MAX]; /* rule ids that decided egress and ingress, 0: not asked */
	__u32 l7;
	__u32 ifindex;       /* of the hook */
	__u32 length;        /* octets of this packet, from the network header */
	__u64 packets;       /* EVENT_END: totals of both directions; EVENT_SOCKET: the socket's cookie */
	__u64 bytes;         /* EVENT_SOCKET: the cookie of its network namespace */
	union addr frontend; /* that the client asked for, zero: none; the connection's destination is the backend */
	__be16 frontend_port;
	__u16 pad;
	__u32 service; /* number */
};
_Static_assert(sizeof(struct event) == 128, "struct event is two cache lines");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4 << 20);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} events SEC(".maps");

/* Records that found the ring buffer full. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} events_lost SEC(".maps");
