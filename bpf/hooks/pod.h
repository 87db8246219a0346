/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Everything a pod sends. Attached to the ingress of its host-side interface. */
#pragma once
#include "../lib/deliver.h"
#include "../lib/neigh.h"
#include "../lib/shortcut.h"

static __always_inline bool owns_source(const struct endpoint *ep, const struct pkt *p)
{
	return !addr_zero(&p->saddr) && addr_equal(&p->saddr, p->family == 4 ? &ep->v4 : &ep->v6);
}

/* A pod may not speak the overlay's protocol to any node, nor to the world with this node's address: behind an address
 * that the ipcache does not have there may be a node, and it would trust the sender.
 */
static __always_inline bool forges_tunnel(const struct scratch *s)
{
	return s->p.protocol == IPPROTO_UDP && s->p.dport == bpf_htons(config_tunnel_port) &&
	       (s->kind == DEST_HOST || s->dest_node == 1 ||
		(config_masquerade && s->kind == DEST_NATIVE && s->dest_node != 2));
}

/* To the sending pod itself, s->ends[1] resolved, or nowhere: what says where pods are was not asked about anybody else, and
 * no policy was.
 */
static __always_inline int deliver_back(struct __sk_buff *skb, struct scratch *s)
{
	if (!(s->chosen.flags & TRANSLATION_HAIRPIN) || s->kind != DEST_POD || s->dest_ifindex != skb->ifindex)
		return drop(s, s->p.quoted ? -DROP_ICMP_UNRELATED : -DROP_NAT_NO_MAPPING);
	return deliver_local(skb, s);
}

/* A pod that was given itself as backend sees the gateway as its client: its answers to there go back to it. Returns what
 * the hook shall return, or 0: no such answer.
 */
static __always_inline int hairpin_answer(struct __sk_buff *skb, struct scratch *s)
{
	int result;

	if (!reports_own(s))
		return drop(s, -DROP_ICMP_UNRELATED);
	result = service_back(skb, s);
	if (result > 0)
		result = resolve(s, 1);
	else if (!result)
		return 0;
	return result < 0 ? drop(s, result) : deliver_back(skb, s);
}

/* To itself, whatever its policies say: a process reaches its own pod without asking them, too. */
static __always_inline int hairpin(struct __sk_buff *skb, struct scratch *s)
{
	if (s->made) {
		s->p.saddr = s->p.daddr; /* the event speaks of the pod */
		report(s);
	}
	return deliver_back(skb, s);
}

/* A frontend's address becomes that of its backend, and s->ends[1] and where to send with it. Traffic between pods is not
 * looked at. Returns enum service_out_result or a negated drop reason.
 */
static __always_inline int to_backend(struct __sk_buff *skb, struct scratch *s)
{
	int result;

	if (s->kind == DEST_POD || s->kind == DEST_TUNNEL || (s->kind == DEST_NATIVE && s->dest_node == 2))
		return SERVICE_OUT_NONE;
	result = service_out(skb, s, FRONTEND_CLUSTER);
	if (result == SERVICE_OUT_TRANSLATED) {
		int error = resolve(s, 1);

		if (error < 0)
			return error;
	}
	return result;
}

static __always_inline __u32 path_mtu(const struct scratch *s, const struct endpoint *ep)
{
	if (s->kind == DEST_TUNNEL)
		return config_tunnel_mtu;
	return s->kind == DEST_NATIVE ? config_underlay_mtu : ep->mtu > 65000 ? ep->mtu : 65535;
}

SEC("tc")
int from_pod(struct __sk_buff *skb)
{
	__u32 ifindex = skb->ifindex, mtu;
	struct endpoint *ep;
	struct scratch *s;
	union addr gateway;
	bool to_gateway;
	int result;

	result = shortcut(skb);
	if (result >= 0)
		return result;
	s = start(skb, OBS_FROM_POD);
	if (!s)
		return TC_ACT_SHOT;
	end_remote(&s->ends[0], 0, false);
	end_remote(&s->ends[1], 0, false);
	s->kind = DEST_POD;
	s->dest_node = 0;
	ep = bpf_map_lookup_elem(&endpoints, &ifindex);
	if (!ep)
		return drop(s, -DROP_NO_ENDPOINT);
	end_of_endpoint(&s->ends[0], ep);
	s->client_netns = ep->netns;
	skb->mark = 0;
	if (skb->vlan_present) /* the tag would leave the node with the packet */
		return drop(s, -DROP_UNSUPPORTED_L3);
	if (skb->protocol == bpf_htons(ETH_P_ARP))
		return arp_answer(skb, s, ep);
	result = pkt_parse(skb, &s->p);
	if (result < 0)
		return drop(s, result);
	if (is_nd(&s->p) && s->p.frag == FRAG_NONE)
		return nd_answer(skb, s, ep);
	gateway = gateway_of(s->p.family);
	to_gateway = addr_equal(&s->p.daddr, &gateway) && owns_source(ep, &s->p);
	if (stays_on_link(&s->p.daddr) && !to_gateway)
		return drop_quietly(s, -DROP_UNSUPPORTED_DEST);
	if (!owns_source(ep, &s->p))
		return drop(s, -DROP_INVALID_SIP);
	if (s->p.frag != FRAG_NONE) {
		result = frag_ports(s);
		if (result < 0)
			return drop(s, result);
	}
	if (to_gateway) {
		result = hairpin_answer(skb, s);
		if (result)
			return result;
		if (s->p.family == 6)
			return drop_quietly(s, -DROP_UNSUPPORTED_DEST);
	}
	result = resolve(s, 1);
	if (result < 0)
		return drop(s, result);
	result = to_backend(skb, s);
	if (result < 0)
		return drop(s, result);
	if (result == SERVICE_OUT_REJECT)
		return reject_answer(skb, s, ep);
	if (result == SERVICE_OUT_TRANSLATED && s->chosen.flags & TRANSLATION_HAIRPIN)
		return hairpin(skb, s);
	if (forges_tunnel(s))
		return drop(s, -DROP_TUNNEL_PORT);
	result = track(s, TRACK_POLICY);
	if (result < 0)
		return drop(s, result);
	if (result != TRACK_FORWARD) {
		result = to_proxy(skb, s, result == TRACK_TO_LISTENER);
		return result < 0 ? drop(s, result) : TC_ACT_OK;
	}
	result = route_replies(s);
	if (result < 0)
		return drop(s, result);
	mtu = path_mtu(s, ep);
	if (wire_length(skb, &s->p) > mtu && (s->p.dont_fragment || s->kind == DEST_NATIVE)) {
		if (s->service && service_undo(skb, s))
			return drop(s, -DROP_WRITE_ERROR);
		return too_big_answer(skb, s, ep, mtu);
	}
	if (s->kind != DEST_POD && answers_service(s)) {
		result = service_back(skb, s);
		if (result <= 0)
			return drop(s, result ?: -DROP_NAT_NO_MAPPING);
	}
	switch (s->kind) {
	case DEST_POD:
		return deliver_local(skb, s);
	case DEST_HOST:
		count(0, DIR_EGRESS, s->p.length);
		return TC_ACT_OK;
	case DEST_TUNNEL:
		return encapsulate(skb, s);
	default:
		return send_native(skb, s);
	}
}
