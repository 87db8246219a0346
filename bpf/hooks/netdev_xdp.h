/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Connections from outside to backends of other nodes that are known and plain, and their answers, turned round before the
 * kernel makes a packet of the frame. Everything else goes on to `from_netdev`, which also begins and ends them: here are
 * two or three look-ups and no policy. Only where backends are reached natively.
 */
#pragma once
#include "../lib/xdp.h"

/* Whether the other end is reached by the underlay as it is. */
static __always_inline bool is_native(const union addr *addr)
{
	struct ipcache_key key = { .prefixlen = 128, .addr = *addr };
	struct ipcache_entry *entry = bpf_map_lookup_elem(&ipcache, &key);

	return !entry || !config_tunnel || !(entry->flags & IPCACHE_POD);
}

/* Whether the frontend of a datagram is as open as when its connection began; else tc judges the client again. */
static __always_inline bool is_open(struct frame *f)
{
	struct ipcache_key key = { .prefixlen = 128, .addr = f->saddr };
	struct ipcache_entry *entry = bpf_map_lookup_elem(&ipcache, &key);
	struct wish *w = &f->wish;
	struct frontend *found;

	w->addr = f->daddr;
	w->port = f->dport;
	w->protocol = f->protocol;
	w->scope = entry && entry->flags & (IPCACHE_POD | IPCACHE_NODE) ? FRONTEND_CLUSTER : FRONTEND_EXTERNAL;
	w->node = bpf_map_lookup_elem(&local_addrs, &f->daddr) ? WISH_THIS_NODE : WISH_NO_NODE;
	found = frontend_find(w);
	return found && found->count && !(found->flags & FRONTEND_SOURCE_RANGES);
}

/* A client's packet: to the backend, from this node or (DSR) from the client. False: not one for here. */
static __always_inline bool turn_out(struct frame *f)
{
	struct translation *out, *back;
	struct nat_entry *there, *half;

	f->key.client = f->saddr;
	f->key.client_port = f->sport;
	f->key.peer = f->daddr;
	f->key.peer_port = f->dport;
	f->key.protocol = f->protocol;
	f->key.dir = TRANSLATION_OUT;
	out = bpf_map_lookup_elem(&translations, &f->key);
	if (!out || out->expires <= f->now || ct_closed(out->state) || !serves(out, f->protocol))
		return false;
	if (!(out->flags & TRANSLATION_SNAT) && !(out->flags & TRANSLATION_DSR && f->protocol == IPPROTO_TCP))
		return false;
	if (f->protocol == IPPROTO_UDP && !is_open(f))
		return false;
	if (out->flags & (TRANSLATION_LOCAL | TRANSLATION_HAIRPIN) || !is_native(&out->addr))
		return false;
	f->to[1] = out->addr;
	f->to_port[1] = out->port;
	f->key.peer = out->addr;
	f->key.peer_port = out->port;
	f->key.dir = TRANSLATION_BACK;
	back = bpf_map_lookup_elem(&translations, &f->key);
	if (!back || back->expires <= f->now)
		return false;
	f->to[0] = f->saddr;
	f->to_port[0] = f->sport;
	if (out->flags & TRANSLATION_SNAT) {
		f->nat.inner = f->saddr;
		f->nat.inner_port = f->sport;
		f->nat.peer = out->addr;
		f->nat.peer_port = out->port;
		f->nat.protocol = f->protocol;
		f->nat.dir = NAT_OUT;
		there = bpf_map_lookup_elem(&nat, &f->nat);
		if (!there || there->expires < f->now)
			return false;
		f->to[0] = there->addr;
		f->to_port[0] = there->port;
		f->nat.inner = there->addr;
		f->nat.inner_port = there->port;
		f->nat.dir = NAT_IN;
		half = bpf_map_lookup_elem(&nat, &f->nat);
		if (!half || half->expires < f->now || !addr_equal(&half->addr, &f->saddr) || half->port != f->sport)
			return false;
		there->expires = half->expires = f->now + ct_life(f->protocol, out->state);
	} else {
		out->state |= CT_SEEN_REPLY; /* as rows_of_client() */
	}
	out->expires = back->expires = f->now + ct_life(f->protocol, out->state);
	return true;
}

/* A backend's answer to this node: to the client, from the frontend. */
static __always_inline bool turn_back(struct frame *f)
{
	struct translation *out, *back;
	struct nat_entry *half;

	f->nat.inner = f->daddr;
	f->nat.inner_port = f->dport;
	f->nat.peer = f->saddr;
	f->nat.peer_port = f->sport;
	f->nat.protocol = f->protocol;
	f->nat.dir = NAT_IN;
	half = bpf_map_lookup_elem(&nat, &f->nat);
	if (!half || half->expires < f->now)
		return false;
	f->key.client = half->addr;
	f->key.client_port = half->port;
	f->key.peer = f->saddr;
	f->key.peer_port = f->sport;
	f->key.protocol = f->protocol;
	f->key.dir = TRANSLATION_BACK;
	back = bpf_map_lookup_elem(&translations, &f->key);
	/* A pod's own connection, masqueraded, has no such mark; the first answer is for tc, which notes that there was one. */
	if (!back || back->expires <= f->now || !(back->flags & TRANSLATION_SNAT) || !(back->state & CT_SEEN_REPLY))
		return false;
	f->to[0] = back->addr;
	f->to_port[0] = back->port;
	f->to[1] = f->key.client;
	f->to_port[1] = f->key.client_port;
	f->key.peer = back->addr;
	f->key.peer_port = back->port;
	f->key.dir = TRANSLATION_OUT;
	out = bpf_map_lookup_elem(&translations, &f->key);
	if (!out)
		return false;
	out->expires = back->expires = f->now + ct_life(f->protocol, back->state);
	if (f->protocol != IPPROTO_TCP) /* as nat_in() */
		half->expires = back->expires;
	return true;
}

SEC("xdp")
int xdp_netdev(struct xdp_md *ctx)
{
	struct frame *f = frame_get();

	if (!f || !frame_read(ctx, f))
		return XDP_PASS;
	if (f->protocol == IPPROTO_UDP && f->dport == bpf_htons(config_tunnel_port))
		return XDP_PASS;
	f->now = expiry_clock();
	if (!turn_out(f) && !turn_back(f))
		return XDP_PASS;
	return frame_send(ctx, f);
}
