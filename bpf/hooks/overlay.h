/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Everything that arrives by the overlay. Attached to the ingress of the VXLAN device. */
#pragma once
#include "../lib/outside.h"

/* The outer source and the identity; 0 or a negated drop reason. */
static __always_inline int tunnel_header(struct __sk_buff *skb, union addr *outer, __u32 *identity)
{
	struct bpf_tunnel_key key = {};

	if (!bpf_skb_get_tunnel_key(skb, &key, sizeof(key), 0)) {
		addr_set_v4(outer, bpf_htonl(key.remote_ipv4));
	} else {
		if (bpf_skb_get_tunnel_key(skb, &key, sizeof(key), BPF_F_TUNINFO_IPV6))
			return -DROP_TUNNEL_KEY;
		__builtin_memcpy(outer, key.remote_ipv6, 16);
	}
	*identity = key.tunnel_id;
	return 0;
}

/* Whether a node may pass on a packet of a client outside with this source: its own address, or the client's (DSR). */
static __always_inline bool passes_on(const struct ipcache_entry *inner, const union addr *source,
				      const union addr *outer)
{
	if (!inner || !(inner->flags & (IPCACHE_POD | IPCACHE_NODE)))
		return true;
	return inner->flags & IPCACHE_NODE && (addr_equal(&inner->tunnel, outer) || addr_equal(source, outer));
}

/* Nobody can lie about who they are: docs/adr/0002, checks of from_overlay. */
static __always_inline int check_sender(struct scratch *s, const union addr *outer, __u32 identity)
{
	struct ipcache_entry *node = ipcache_find(outer), *inner;

	if (!node || !(node->flags & IPCACHE_NODE))
		return -DROP_UNKNOWN_NODE;
	if (!identity || identity == IDENTITY_HOST || identity >> 24 ||
	    (scope_of(identity) == SCOPE_WORLD && identity != IDENTITY_WORLD))
		return -DROP_INVALID_VNI;
	if (stays_on_link(&s->p.saddr) || bpf_map_lookup_elem(&local_addrs, &s->p.saddr))
		return -DROP_INVALID_SIP;
	inner = ipcache_find(&s->p.saddr);
	if (inner && inner->flags & (IPCACHE_POD | IPCACHE_NODE) && !addr_equal(&inner->tunnel, outer) &&
	    (inner->flags & IPCACHE_POD || !addr_zero(&inner->tunnel)))
		return -DROP_INVALID_SIP;
	if (identity == IDENTITY_WORLD)
		return passes_on(inner, &s->p.saddr, outer) ? 0 : -DROP_INVALID_SIP;
	if (inner && inner->flags & IPCACHE_NODE)
		return identity == IDENTITY_REMOTE_NODE ? 0 : -DROP_INVALID_SIP;
	return identity == IDENTITY_REMOTE_NODE ? -DROP_INVALID_SIP : 0;
}

SEC("tc")
int from_overlay(struct __sk_buff *skb)
{
	struct scratch *s = start(skb, OBS_FROM_OVERLAY);
	union addr outer = {};
	__u32 identity = 0;
	int result, mode = TRACK_POLICY;

	if (!s)
		return TC_ACT_SHOT;
	end_remote(&s->ends[0], 0, false);
	end_remote(&s->ends[1], 0, false);
	s->in_tunnel = 1;
	if (skb->vlan_present)
		return drop(s, -DROP_UNSUPPORTED_L3);
	result = tunnel_header(skb, &outer, &identity);
	if (result < 0)
		return drop(s, result);
	s->ends[0].identity = identity;
	result = pkt_parse(skb, &s->p);
	if (result < 0)
		return drop(s, result);
	result = check_sender(s, &outer, identity);
	if (result < 0)
		return drop(s, result);
	end_remote(&s->ends[0], identity, true);
	if (identity == IDENTITY_WORLD)
		mode = from_client_elsewhere(skb, s);
	else if (identity == IDENTITY_REMOTE_NODE) /* a node may have an identity of its own here */
		mode = resolve(s, 0);
	if (mode < 0)
		return drop(s, mode);
	if (s->p.frag != FRAG_NONE) {
		result = frag_ports(s);
		if (result < 0)
			return drop(s, result);
	}
	result = resolve(s, 1);
	if (result < 0)
		return drop(s, result);
	if (s->kind != DEST_POD && s->kind != DEST_HOST)
		return drop(s, -DROP_NO_ENDPOINT);
	if (s->kind == DEST_HOST) {
		result = nat_in(skb, s);
		if (result)
			return result < 0 ? drop(s, result) : answer_outside(skb, s);
		mode = TRACK_REPLY;
	}
	result = track(s, mode);
	if (result >= 0 && s->dsr) {
		int error = dsr_remember(s);

		if (error)
			result = error;
	}
	if (result < 0)
		return drop(s, result);
	if (result != TRACK_FORWARD && s->flags & CT_SERVICE)
		note_stack_serves(s);
	if (result != TRACK_FORWARD) {
		result = to_proxy(skb, s, result == TRACK_TO_LISTENER);
		return result < 0 ? drop(s, result) : TC_ACT_OK;
	}
	if (s->kind == DEST_POD)
		return deliver_local(skb, s);
	count(0, DIR_INGRESS, s->p.length);
	bpf_skb_change_type(skb, PACKET_HOST);
	return TC_ACT_OK;
}
