/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* What arrives at the node outside the overlay. Attached to the ingress of the underlay device.
 *
 * Packets for the node itself belong to its stack, unless they answer a masqueraded connection or a node policy refuses them.
 */
#pragma once
#include "../lib/outside.h"

enum owner {
	OWNER_STACK = 0,
	OWNER_POD = 1,
	OWNER_MASQUERADED = 2, /* a pod, found by its mapping */
	OWNER_CLIENT = 3,      /* one outside, of a service whose backend answers: found by its mapping */
	OWNER_OVERLAY = 4,     /* the stack, for the overlay's device */
};

/* Whose the packet is: enum owner or a negated drop reason. */
static __always_inline int for_pod(struct __sk_buff *skb, struct scratch *s)
{
	struct local_addr *local;
	int result;

	if (config_tunnel && s->p.protocol == IPPROTO_UDP && s->p.dport == bpf_htons(config_tunnel_port))
		return OWNER_OVERLAY;
	local = bpf_map_lookup_elem(&local_addrs, &s->p.daddr);
	s->kind = local ? DEST_HOST : DEST_NATIVE;
	s->dest_node = 0;
	if (!local)
		return OWNER_STACK;
	if (!(local->flags & LOCAL_HOST))
		return OWNER_POD;
	result = nat_in(skb, s);
	if (result <= 0)
		return result;
	local = bpf_map_lookup_elem(&local_addrs, &s->p.daddr);
	return local && !(local->flags & LOCAL_HOST) ? OWNER_MASQUERADED : OWNER_CLIENT;
}

/* Whether an address outside is the pods' gateway: answers to there are those of pods that reach themselves. */
static __always_inline bool is_gateway(const union addr *addr, __u8 family)
{
	union addr gateway = gateway_of(family);

	return addr_equal(addr, &gateway);
}

static __always_inline bool is_link_local_v4(const union addr *addr)
{
	return addr_is_v4(addr) && addr->b[12] == 169 && addr->b[13] == 254; /* RFC 3927 */
}

/* Whether a packet that the stack would get may ask for a service: not from this node or the link, not to many. */
static __always_inline bool may_ask(const struct scratch *s)
{
	const struct pkt *p = &s->p;

	if (!has_service_ports(p) && !p->quoted && s->kind == DEST_HOST)
		return false;
	return !stays_on_link(&p->daddr) && !stays_on_link(&p->saddr) && !is_link_local_v4(&p->saddr) &&
	       !is_gateway(&p->saddr, p->family) && !is_nd(p) && !bpf_map_lookup_elem(&local_addrs, &p->saddr);
}

/* A packet for the stack that may be for a service: enum service_out_result or a negated drop reason. */
static __noinline int ask_service(struct __sk_buff *skb, struct scratch *s)
{
	struct ipcache_entry *entry;
	int result;

	if (!s)
		return -DROP_INTERNAL;
	if (!may_ask(s))
		return SERVICE_OUT_NONE;
	entry = end_outside(s, &s->ends[0], &s->p.saddr);
	result = service_out(
		skb, s, entry && entry->flags & (IPCACHE_POD | IPCACHE_NODE) ? FRONTEND_CLUSTER : FRONTEND_EXTERNAL);
	if (result == SERVICE_OUT_TRANSLATED) {
		int error = resolve(s, 1);

		if (error)
			return error;
	}
	return result;
}

/* The source as the ipcache knows it; an address of a pod or of this node does not come from outside. Only the node has
 * neighbours with link-local addresses; and without masquerading, pods of other nodes speak to it with their own.
 */
static __always_inline int source_outside(struct scratch *s, bool to_pod)
{
	struct ipcache_entry *entry;

	if ((to_pod && (stays_on_link(&s->p.saddr) || is_gateway(&s->p.saddr, s->p.family))) ||
	    bpf_map_lookup_elem(&local_addrs, &s->p.saddr))
		return -DROP_INVALID_SIP;
	entry = end_outside(s, &s->ends[0], &s->p.saddr);
	if (entry && entry->flags & IPCACHE_POD && config_tunnel && (to_pod || config_masquerade))
		return -DROP_INVALID_SIP;
	return 0;
}

/* The stack's, unless a node policy is in force and refuses it. `error`: why the packet could not be understood, or 0. */
static __noinline int for_node(struct __sk_buff *skb, struct scratch *s, int error)
{
	struct endpoint *node = policed_node();
	__u32 policy;

	if (!s)
		return TC_ACT_SHOT;
	if (!node || error == -DROP_UNSUPPORTED_L3)
		return TC_ACT_UNSPEC;
	end_of_endpoint(&s->ends[1], node);
	policy = s->ends[1].policy[DIR_INGRESS];
	if (error != -DROP_INVALID_PACKET && !is_for_node(skb, s))
		return TC_ACT_UNSPEC; /* forwarded */
	if (error)
		return policy ? drop(s, error) : TC_ACT_UNSPEC;
	if (is_link_control(&s->p) || is_overlay(&s->p, &s->p.saddr))
		return TC_ACT_UNSPEC;
	error = source_outside(s, false);
	return error < 0 ? drop(s, error) : judge_node(skb, s, policy);
}

/* What cannot be parsed or assigned to a datagram: dropped here if it is for a pod. */
static __always_inline int refuse(struct __sk_buff *skb, struct scratch *s, int error)
{
	struct local_addr *local = bpf_map_lookup_elem(&local_addrs, &s->p.daddr);

	return local && !(local->flags & LOCAL_HOST) ? drop(s, error) : for_node(skb, s, error);
}

/* To a pod here, both ends resolved. `mode`: enum track_mode. */
static __noinline int to_pod(struct __sk_buff *skb, struct scratch *s, int mode)
{
	int result;

	if (!s)
		return TC_ACT_SHOT;
	result = track(s, mode);
	/* A mapping lets in answers only: a connection of the peer's own making has no policy that could allow it. */
	if (mode == TRACK_REPLY && result == -DROP_INVALID_SIP)
		result = -DROP_NAT_NO_MAPPING;
	if (result >= 0 && s->dsr) {
		int error = dsr_remember(s);

		if (error)
			result = error;
	}
	if (result < 0)
		return drop(s, result);
	if (result != TRACK_FORWARD) {
		if (s->flags & CT_SERVICE)
			note_stack_serves(s);
		result = to_proxy(skb, s, result == TRACK_TO_LISTENER);
		return result < 0 ? drop(s, result) : TC_ACT_OK;
	}
	return deliver_local(skb, s);
}

/* A packet that has been given a backend. */
static __always_inline int to_chosen(struct __sk_buff *skb, struct scratch *s)
{
	if (s->kind == DEST_POD) {
		int result = source_outside(s, true);

		return result < 0 ? drop(s, result) : to_pod(skb, s, TRACK_POLICY);
	}
	if (s->kind != DEST_HOST)
		return to_backend_elsewhere(skb, s);
	note_stack_serves(s);
	if (s->made && !policed_node()) /* else what its policies say is reported */
		report(s);
	return for_node(skb, s, 0);
}

/* The stack's, a service's, or a client's that waits for the answer of one. */
static __always_inline int for_others(struct __sk_buff *skb, struct scratch *s, int owner)
{
	int result;

	if (owner == OWNER_CLIENT)
		return answer_outside(skb, s);
	result = owner == OWNER_OVERLAY ? SERVICE_OUT_NONE : ask_service(skb, s);
	if (result < 0)
		return drop(s, result);
	if (result == SERVICE_OUT_REJECT)
		return reject_answer(skb, s, NULL);
	return result == SERVICE_OUT_TRANSLATED ? to_chosen(skb, s) : for_node(skb, s, 0);
}

/* Whether a packet to a pod may name a frontend: by the underlay only where pods are reached that way, and not from a pod or
 * a node, which have clients outside only with their own address.
 */
static __always_inline bool may_name_frontend(const struct scratch *s)
{
	return !config_tunnel && !s->ends[0].known && !s->p.quoted;
}

SEC("tc")
int from_netdev(struct __sk_buff *skb)
{
	struct scratch *s = start(skb, OBS_FROM_NETDEV);
	int result, owner;

	if (!s)
		return TC_ACT_SHOT;
	end_remote(&s->ends[0], 0, false);
	end_remote(&s->ends[1], 0, false);
	if (is_of_vlan(skb))
		return TC_ACT_UNSPEC;
	result = pkt_parse(skb, &s->p);
	if (!result && s->p.frag != FRAG_NONE)
		result = frag_ports(s);
	if (result < 0)
		return refuse(skb, s, result);
	owner = for_pod(skb, s);
	if (owner < 0)
		return drop(s, owner);
	if (owner != OWNER_POD && owner != OWNER_MASQUERADED)
		return for_others(skb, s, owner);
	result = source_outside(s, true);
	if (result < 0)
		return drop(s, result);
	if (owner == OWNER_POD && may_name_frontend(s)) {
		result = dsr_accept(skb, s, false);
		if (result < 0)
			return drop(s, result);
	}
	result = resolve(s, 1);
	if (result < 0)
		return drop(s, result);
	if (s->kind != DEST_POD)
		return drop(s, -DROP_NO_ENDPOINT);
	return to_pod(skb, s, owner == OWNER_MASQUERADED ? TRACK_REPLY : TRACK_POLICY);
}
