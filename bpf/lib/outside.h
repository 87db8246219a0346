/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Services asked from outside: on to a backend elsewhere, and its answers back. See docs/explanation/services.md, "From
 * outside". The hop limit is left alone: to both ends the node is the service, not a router.
 */
#pragma once
#include "dsr.h"
#include "node.h"

/* Until when something on this node may answer for a service by way of the stack, expiry_clock(): the node's own processes
 * and the proxy, whose packets `to_netdev` otherwise need not look at.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} stack_serves SEC(".maps");

static __always_inline bool does_stack_serve(void)
{
	__u32 zero = 0;
	__u64 *until = bpf_map_lookup_elem(&stack_serves, &zero);

	return until && *(volatile __u64 *)until > expiry_clock();
}

static __always_inline void note_stack_serves(const struct scratch *s)
{
	__u32 zero = 0;
	__u64 *until = bpf_map_lookup_elem(&stack_serves, &zero);

	/* As long as a connection that was refreshed now; written once in a while, since all CPUs read it. */
	if (until && *(volatile __u64 *)until < s->now + CT_LIFE_TCP)
		*(volatile __u64 *)until = s->now + CT_LIFE_TCP + 600 * SECONDS;
}

/* Out of the underlay device, as it is now. */
static __always_inline int leave(struct __sk_buff *skb, struct scratch *s)
{
	count(0, DIR_EGRESS, s->p.length);
	skb->mark = MARK_JUDGED;
	return bpf_redirect_neigh(config_native_ifindex, NULL, 0, 0);
}

/* A backend's answer to the node's address of which nat_in() has made the client's: goes to the client, from the frontend. */
static __noinline int answer_outside(struct __sk_buff *skb, struct scratch *s)
{
	int result;

	if (!s)
		return TC_ACT_SHOT;
	result = service_back(skb, s);
	if (!result)
		result = -DROP_NAT_NO_MAPPING;
	return result < 0 ? drop(s, result) : leave(skb, s);
}

/* Remembers in both rows how a connection reaches its backend: XDP reads it, and it stays so to its end. */
static __always_inline void translation_mark(struct scratch *s, __u32 flag)
{
	struct translation *row = bpf_map_lookup_elem(&translations, &s->out);

	s->chosen.flags |= flag;
	if (row)
		row->flags = s->chosen.flags;
	row = bpf_map_lookup_elem(&translations, &s->back);
	if (row)
		row->flags = s->chosen.flags;
}

/* TRANSLATION_SNAT or TRANSLATION_DSR. The client must be one of the world's, since the overlay carries no other address than
 * a pod's or the sending node's own, and the backend a pod: only its node knows to answer.
 */
static __always_inline __u32 forwarding_of(struct __sk_buff *skb, struct scratch *s)
{
	__u32 known = s->chosen.flags & (TRANSLATION_SNAT | TRANSLATION_DSR);
	__u32 flag = TRANSLATION_SNAT;

	if (known)
		return known;
	if (s->wish.flags & FRONTEND_DSR && s->wish.scope == FRONTEND_EXTERNAL &&
	    (s->kind == DEST_TUNNEL || s->dest_node == 2) &&
	    (s->p.protocol == IPPROTO_TCP || s->p.protocol == IPPROTO_UDP) && dsr_fits(skb, &s->p))
		flag = TRANSLATION_DSR;
	translation_mark(s, flag);
	return flag;
}

/* To a backend, whose next hop the client's row remembers: to ask the routing tables is a quarter of what a packet costs. */
static __noinline int leave_to_backend(struct __sk_buff *skb, struct scratch *s)
{
	struct bpf_redir_neigh to = { .nh_family = AF_INET };
	struct bpf_fib_lookup fib = { .family = AF_INET };
	struct translation *row;

	if (!s)
		return TC_ACT_SHOT;
	if (s->p.family != 4 || s->p.quoted)
		return leave(skb, s);
	if (!s->chosen.via) {
		fib.ifindex = config_native_ifindex;
		fib.ipv4_src = s->p.saddr.w[3];
		fib.ipv4_dst = s->p.daddr.w[3];
		if (bpf_fib_lookup(skb, &fib, sizeof(fib), BPF_FIB_LOOKUP_OUTPUT) != BPF_FIB_LKUP_RET_SUCCESS ||
		    fib.family != AF_INET || fib.ifindex != config_native_ifindex) /* RFC 5549: an IPv6 next hop */
			return leave(skb, s); /* the stack's part: it finds the neighbour, too */
		row = bpf_map_lookup_elem(&translations, &s->out);
		if (row)
			row->via = fib.ipv4_dst;
		s->chosen.via = fib.ipv4_dst;
	}
	count(0, DIR_EGRESS, s->p.length);
	skb->mark = MARK_JUDGED;
	to.ipv4_nh = s->chosen.via;
	return bpf_redirect_neigh(config_native_ifindex, &to, sizeof(to), 0);
}

/* An ICMP error of a client, or of a router on the way to it, about an answer: the backend's node must think it is about what
 * it sent to this node.
 */
static __noinline int snat_quoted(struct __sk_buff *skb, struct scratch *s)
{
	struct nat_key key = { .dir = NAT_OUT };
	struct nat_entry *mapped;
	union addr node;
	int error;

	if (!s)
		return -DROP_INTERNAL;
	key.inner = s->p.q_daddr;
	key.inner_port = s->p.q_dport;
	key.peer = s->p.q_saddr;
	key.peer_port = s->p.q_sport;
	key.protocol = s->p.q_protocol;
	mapped = bpf_map_lookup_elem(&nat, &key);
	if (!mapped || mapped->expires < s->now)
		return -DROP_NAT_NO_MAPPING;
	node = mapped->addr;
	error = rewrite_quoted(skb, s, false, &node, mapped->port);
	return error ?: rewrite_addr(skb, &s->p, true, &node);
}

/* The client is told what still fits, by the address that it asked. */
static __noinline int too_big_outside(struct __sk_buff *skb, struct scratch *s, __u32 mtu)
{
	int error;

	if (!s)
		return TC_ACT_SHOT;
	if (!may_answer(&s->p))
		return drop(s, -DROP_TOO_BIG);
	error = service_undo(skb, s);
	if (!error)
		error = icmp_error(skb, s, &s->p.daddr,
				   s->p.family == 4 ? ICMP_DEST_UNREACH << 8 | ICMP_FRAG_NEEDED :
						      ICMPV6_PKT_TOOBIG << 8,
				   bpf_htonl(mtu));
	if (error)
		return drop(s, error);
	drop(s, -DROP_TOO_BIG);
	error = answer_link(skb);
	return error < 0 ? TC_ACT_SHOT : error;
}

/* Room for the frontend is asked of a packet that would just fit without it: then SNAT, if it may not be told. */
static __always_inline __u32 carried(const struct pkt *p, __u32 forwarding)
{
	bool carries = forwarding == TRANSLATION_DSR && (p->protocol == IPPROTO_UDP || is_first_segment(p));

	return carries ? dsr_room(p) : 0;
}

/* A translated packet, s->ends[1] and s->kind resolved, to a backend on another node. Returns what the hook shall return. */
static __noinline int to_backend_elsewhere(struct __sk_buff *skb, struct scratch *s)
{
	__u32 forwarding, room, mtu, length;
	int error = 0;

	if (!s)
		return TC_ACT_SHOT;
	if (dsr_named(skb, s)) /* the client's own word, which the backend's node would take for this node's */
		return drop(s, -DROP_INVALID_SIP);
	forwarding = s->p.quoted ? s->chosen.flags : forwarding_of(skb, s);
	/* The first fragment may have no room for the frontend where the last has: all take the same way. */
	if (s->p.frag != FRAG_NONE && s->p.protocol == IPPROTO_UDP && s->kind == DEST_NATIVE)
		forwarding = TRANSLATION_SNAT;
	room = s->p.quoted ? 0 : carried(&s->p, forwarding);
	mtu = s->kind == DEST_TUNNEL ? config_tunnel_mtu : config_underlay_mtu;
	length = wire_length(skb, &s->p);
	if (length + room > mtu && s->p.dont_fragment)
		return too_big_outside(skb, s, mtu - room);
	/* Nobody cuts what is redirected natively; the overlay's device cuts what is around it. */
	if (length + room > mtu && s->kind == DEST_NATIVE) {
		if (length > mtu)
			return drop(s, -DROP_TOO_BIG);
		forwarding = TRANSLATION_SNAT;
		room = 0;
	}
	if (s->made)
		report(s);
	if (room)
		error = dsr_put(skb, s);
	else if (forwarding != TRANSLATION_DSR && s->p.quoted)
		error = s->chosen.flags & TRANSLATION_SNAT ? snat_quoted(skb, s) : 0;
	else if (forwarding != TRANSLATION_DSR) {
		s->flags = s->chosen.state; /* the mapping lives as long as the connection */
		error = nat_out(skb, s);
	}
	if (error)
		return drop(s, error);
	if (s->kind != DEST_TUNNEL)
		return leave_to_backend(skb, s);
	s->ends[0].identity =
		IDENTITY_WORLD; /* both families': a number of a dual-stack cluster would mean nothing elsewhere */
	return encapsulate(skb, s);
}

/* ---- the backend's end of direct server return ------------------------------------------------------------------- */

/* The frontend that the packet names, if this node knows it and it works that way; else NULL. */
static __always_inline struct frontend *dsr_frontend(struct scratch *s)
{
	struct wish *w = &s->wish;
	struct frontend *f;

	w->addr = s->frontend;
	w->port = s->frontend_port;
	w->protocol = s->p.protocol;
	w->scope = FRONTEND_EXTERNAL;
	w->node = is_node(&s->frontend) ? WISH_OTHER_NODE : WISH_NO_NODE;
	f = frontend_find(w);
	return f && f->flags & FRONTEND_DSR ? f : NULL;
}

/* A packet of the world that names its frontend. 1: it does, in s->frontend; 0: it does not; else a negated drop reason.
 * `trusted`: a node of the cluster says so. Anybody else could make a pod speak with an address that is not its own, so only
 * frontends count that are known to be answered like that.
 */
static __noinline int dsr_accept(struct __sk_buff *skb, struct scratch *s, int trusted)
{
	struct source_range_key range = { .prefixlen = 32 + 128 };
	struct frontend *f;
	int result;

	if (!s)
		return -DROP_INTERNAL;
	if (s->p.protocol != IPPROTO_TCP && s->p.protocol != IPPROTO_UDP)
		return 0;
	result = dsr_take(skb, s);
	if (result <= 0)
		return result;
	f = dsr_frontend(s);
	if (!f && !trusted)
		return -DROP_INVALID_SIP;
	if (f && !trusted && f->flags & FRONTEND_SOURCE_RANGES) {
		range.service = f->service;
		range.addr = s->p.saddr;
		if (!bpf_map_lookup_elem(&source_ranges, &range))
			return -DROP_NOT_IN_SRC_RANGE;
	}
	s->service = f ? f->service : 0;
	s->dsr = 1;
	return 1;
}

/* Remembers whose address the answers are to have. 0 or a negated drop reason. */
static __noinline int dsr_remember(struct scratch *s)
{
	struct translation *row;

	if (!s)
		return -DROP_INTERNAL;
	translation_key_set(&s->back, &s->p.saddr, s->p.sport, &s->p.daddr, s->p.dport, s->p.protocol,
			    TRANSLATION_BACK);
	row = translation_find(&s->back, s->now);
	if (row && addr_equal(&row->addr, &s->frontend) && row->port == s->frontend_port && !is_first_segment(&s->p)) {
		row->expires = s->now + ct_life(s->p.protocol, row->state);
		return 0;
	}
	__builtin_memset(&s->chosen, 0, sizeof(s->chosen));
	s->chosen.addr = s->frontend;
	s->chosen.port = s->frontend_port;
	s->chosen.flags = TRANSLATION_DSR | TRANSLATION_LOCAL;
	s->chosen.service = s->service;
	s->chosen.expires = s->now + ct_life(s->p.protocol, 0);
	return translation_put(&s->back, &s->chosen);
}

/* Who a packet of the overlay is from that another node passes on for a client outside (VNI world), in s->ends[0]. Returns
 * the mode for track(), or a negated drop reason.
 */
static __noinline int from_client_elsewhere(struct __sk_buff *skb, struct scratch *s)
{
	int result;

	if (!s)
		return -DROP_INTERNAL;
	if (is_node(&s->p.saddr)) { /* instead of the client's own; check_sender() has seen that it is the sender's */
		end_remote(&s->ends[0], world_identity(&s->p), true);
		return TRACK_POLICY;
	}
	result = resolve(s, 0);
	if (result < 0)
		return result;
	if (s->p.quoted)
		return TRACK_DSR;
	result = dsr_accept(skb, s, true);
	return result < 0 ? result : result ? TRACK_POLICY : TRACK_DSR;
}
