/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* From an address that a client asks for to one backend: three look-ups, however many services there are. Used by the
 * hooks of sockets, tc and XDP alike: nothing here knows a packet. See docs/adr/0011-services.md.
 */
#pragma once
#include <bpf/bpf_helpers.h>
#include "config.h"
#include "maps.h"

#define SECOND 1000000000ULL

enum wish_node {
	WISH_NO_NODE = 0,
	WISH_OTHER_NODE = 1,
	WISH_THIS_NODE = 2,
};

/* What a client asks for, and what it was given. */
struct wish {
	union addr addr; /* the frontend's */
	__be16 port;
	__u8 protocol;
	__u8 scope;  /* enum frontend_scope */
	__u8 node;   /* enum wish_node: the address is a node's, so node ports and host ports count */
	__u8 socket; /* 1: `client` is a network namespace's cookie in d[1] */
	__u16 pad;
	union addr client; /* for session affinity */
	__u32 hash;        /* of the connection: chooses from a Maglev table */
	__u32 backend;     /* out: its number */
	__u32 service;     /* out */
	__u32 flags;       /* out: enum frontend_flag */
	struct backend to; /* out */
};

enum service_result {
	SERVICE_NONE = 0,   /* not an address of a service */
	SERVICE_FOUND = 1,  /* `to` is the backend */
	SERVICE_REJECT = 2, /* nobody serves it: the client is told at once */
	SERVICE_DROP = 3,   /* nobody here serves it, another node may */
};

static __always_inline struct frontend *frontend_find(const struct wish *w)
{
	struct frontend_key key = { .addr = w->addr, .port = w->port, .protocol = w->protocol, .scope = w->scope };
	struct frontend *found = bpf_map_lookup_elem(&frontends, &key);

	if (found)
		return found;
	if (w->node) {
		bool v4 = !w->addr.d[0] && w->addr.w[2] == bpf_htonl(0xffff);

		key.addr.d[0] = 0;
		key.addr.w[2] = v4 ? bpf_htonl(0xffff) : 0;
		key.addr.w[3] = 0;
		found = bpf_map_lookup_elem(&frontends, &key);
		return found && found->flags & FRONTEND_HERE && w->node != WISH_THIS_NODE ? NULL : found;
	}
	key.port = 0;
	key.protocol = 0;
	return bpf_map_lookup_elem(&frontends, &key);
}

static __always_inline __u32 slot_backend(__u32 set, __u32 slot)
{
	struct slot_key key = { .set = set, .slot = slot };
	__u32 *number = bpf_map_lookup_elem(&slots, &key);

	return number ? *number : 0;
}

/* The backend that the client had, if that is recent enough and the set still has it; else 0. */
static __always_inline __u32 affine_backend(const struct wish *w, const struct frontend *f, __u64 now)
{
	struct affinity_key key = { .client = w->client, .service = f->service, .socket = w->socket };
	struct affinity *last = bpf_map_lookup_elem(&affinities, &key);

	if (!last || last->used + f->affinity * SECOND <= now)
		return 0;
	return slot_backend(f->set, SLOT_MEMBER | last->backend);
}

static __always_inline void affinity_note(const struct wish *w, const struct frontend *f, __u64 now)
{
	struct affinity_key key = { .client = w->client, .service = f->service, .socket = w->socket };
	struct affinity fresh = { .used = now, .backend = w->backend };

	bpf_map_update_elem(&affinities, &key, &fresh, BPF_ANY);
}

static __always_inline __u32 chosen_slot(const struct wish *w, const struct frontend *f)
{
	if (f->flags & FRONTEND_MAGLEV && config_maglev_size) {
		__u32 position = w->hash % config_maglev_size;
		struct maglev_key key = { .set = f->set, .chunk = position / MAGLEV_CHUNK };
		struct maglev_chunk *chunk = bpf_map_lookup_elem(&maglev, &key);

		if (chunk)
			return chunk->slot[position & (MAGLEV_CHUNK - 1)];
	}
	return bpf_get_prandom_u32() % f->count;
}

/* Fills `to`, `backend` and `flags` of a wish. Returns enum service_result; `now`: expiry_clock(). */
static __always_inline int service_select_from(struct wish *w, const struct frontend *f, __u64 now)
{
	struct backend *to;

	w->service = f->service;
	w->flags = f->flags;
	if (!f->count)
		return f->flags & FRONTEND_DROP ? SERVICE_DROP : SERVICE_REJECT;
	w->backend = f->flags & FRONTEND_AFFINITY ? affine_backend(w, f, now) : 0;
	if (!w->backend)
		w->backend = slot_backend(f->set, chosen_slot(w, f));
	to = bpf_map_lookup_elem(&backends, &w->backend);
	if (!to)
		return SERVICE_DROP;
	w->to = *to;
	if (f->flags & FRONTEND_AFFINITY)
		affinity_note(w, f, now);
	return SERVICE_FOUND;
}
