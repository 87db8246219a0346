/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Everything the node's stack sends to pods. Attached to the egress of the host device. */
#pragma once
#include "../lib/deliver.h"

/* Whose packet it is: the node's own, the proxy's towards a server, or the proxy's answer to a client. */
static __always_inline int host_mode(const struct __sk_buff *skb, const struct scratch *s)
{
	if ((skb->mark & MARK_MASK) == MARK_FROM_PROXY)
		return TRACK_FROM_PROXY;
	/* Only what was made on this node is the host's: a forwarded packet remembers where it came in. */
	if (s->ends[0].identity == IDENTITY_HOST && !skb->ingress_ifindex)
		return TRACK_POLICY;
	return TRACK_REPLY;
}

SEC("tc")
int from_host(struct __sk_buff *skb)
{
	struct scratch *s = start(skb, OBS_FROM_HOST);
	int result, mode;

	if (!s)
		return TC_ACT_SHOT;
	end_remote(&s->ends[0], 0, false);
	end_remote(&s->ends[1], 0, false);
	s->dest_node = 0;
	result = pkt_parse(skb, &s->p);
	if (result == -DROP_UNSUPPORTED_L3)
		return TC_ACT_OK; /* the device's peer is nobody */
	if (result < 0)
		return drop(s, result);
	if (s->p.family == 6 && (s->p.daddr.b[0] == 0xff || is_nd(&s->p)))
		return TC_ACT_OK; /* the stack's own discovery */
	if (s->p.frag != FRAG_NONE) {
		result = frag_ports(s);
		if (result < 0)
			return drop(s, result);
	}
	result = resolve(s, 0);
	if (result < 0)
		return drop(s, result);
	result = resolve(s, 1);
	if (result < 0)
		return drop(s, result);
	if (s->kind == DEST_NATIVE && !s->dest_node) /* the route led here, so it was meant for a pod */
		return drop(s, -DROP_NO_ENDPOINT);
	mode = host_mode(skb, s);
	result = track(s, mode);
	if (result < 0)
		return drop(s, result);
	if (mode == TRACK_REPLY && !(s->flags & CT_PROXIED))
		return drop(s, -DROP_INVALID_SIP);
	result = route_replies(s);
	if (result < 0)
		return drop(s, result);
	switch (s->kind) {
	case DEST_POD:
		return deliver_local(skb, s);
	case DEST_TUNNEL:
		if (wire_length(skb, &s->p) > config_tunnel_mtu && s->p.dont_fragment)
			return drop(s, -DROP_TOO_BIG); /* the route's MTU keeps the stack below it */
		return encapsulate(skb, s);
	case DEST_NATIVE:
		if (s->dest_node == 2)
			return send_native(skb, s);
		return drop(s, -DROP_NO_ENDPOINT);
	default:
		return drop(s, -DROP_NO_ENDPOINT);
	}
}
