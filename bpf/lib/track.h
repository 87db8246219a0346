/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* From a parsed packet with both ends resolved to what is to be done with it: conntrack, policy, revocation. */
#pragma once
#include "conntrack.h"
#include "exempt.h"
#include "neigh.h"
#include "policy.h"

enum track_mode {
	TRACK_POLICY = 0,     /* a new connection asks the policies */
	TRACK_FROM_PROXY = 1, /* the proxy's leg to the server: never to the proxy again */
	TRACK_REPLY = 2,      /* only packets of a known connection may pass */
	TRACK_NODE = 3,       /* as TRACK_POLICY, but TCP that is under way and not known is TRACK_ASK */
	TRACK_REVERSED = 4,   /* as TRACK_POLICY, but a connection not known was begun by the packet's destination */
	TRACK_DSR = 5,        /* only packets of a client's known connection that another node passes on may pass */
};

enum track_result {
	TRACK_FORWARD = 0,
	TRACK_TO_LISTENER = 1, /* to the proxy, rule set s->l7 */
	TRACK_TO_SOCKET = 2,   /* to the proxy's socket that has this connection */
	TRACK_ASK = 3,         /* TRACK_NODE only: find out who began, then track again */
};

/* Asks one end's policy of one direction; `far`: the other end, at `peer`. */
static __always_inline void ask(struct scratch *s, const struct end *end, const struct end *far, const union addr *peer,
				__u8 direction, __be16 port, struct decision *d)
{
	s->direction = direction;
	if (end->options & EP_OPT_HOST && exempt(s, peer, direction, port)) {
		d->error = 0;
		d->l7 = d->rule = 0;
	} else {
		policy_decide(end->policy[direction], far->identity, s->p.protocol, port, d);
		if (d->l7 && end->options & EP_OPT_HOST) { /* nobody can serve it for the node: fail closed */
			d->l7 = 0;
			d->error = -DROP_PROXY_NOT_FOUND;
		}
	}
	s->rule[direction] = d->rule;
}

/* Asks both ends' policies about the connection this packet belongs to; 0 or a negated drop reason. */
static __always_inline int decide(struct scratch *s, bool reply)
{
	struct pkt *p = &s->p;
	struct end *from = reply ? &s->ends[1] : &s->ends[0], *to = reply ? &s->ends[0] : &s->ends[1];
	__be16 port = reply ? p->sport : p->dport;
	struct decision d = {};
	__u32 l7 = 0;

	if (is_icmp(p)) {
		__u8 type = p->icmp_type;

		if (reply && icmp_is_echo(p->family, type))
			type = p->family == 4 ? ICMP_ECHO : ICMPV6_ECHO_REQUEST;
		port = bpf_htons(type);
	}
	s->rule[DIR_EGRESS] = s->rule[DIR_INGRESS] = 0;
	s->l7 = 0;
	s->audit = 0;
	if (from->id) {
		ask(s, from, to, reply ? &p->saddr : &p->daddr, DIR_EGRESS, port, &d);
		if (d.error && !(from->options & EP_OPT_AUDIT))
			return d.error;
		s->audit |= !!d.error;
		l7 = d.error ? 0 : d.l7;
	}
	if (to->id) {
		ask(s, to, from, reply ? &p->daddr : &p->saddr, DIR_INGRESS, port, &d);
		if (d.error && !(to->options & EP_OPT_AUDIT))
			return d.error;
		s->audit |= !!d.error;
		if (!d.error && d.l7) {
			if (l7 && l7 != d.l7) /* one pass through the proxy cannot enforce two rule sets: fail closed */
				return -DROP_PROXY_NOT_FOUND;
			l7 = d.l7;
		}
	}
	if (l7 && s->observation == OBS_FROM_HOST && s->leg == LEG_DIRECT && !reply)
		/* sockets cannot be assigned on the way out */
		return -DROP_PROXY_NOT_FOUND;
	s->l7 = l7;
	return 0;
}

static __always_inline void report(struct scratch *s)
{
	__u8 verdict = s->audit ? VERDICT_AUDIT : s->l7 ? VERDICT_REDIRECTED : VERDICT_FORWARDED;

	event_send(s, EVENT_VERDICT, verdict, 0);
}

/* A newer epoch: decides again in the connection's original direction, with the identities and policies of now. */
static __always_inline void decide_again(struct scratch *s, struct ct_entry *e, bool reply)
{
	struct end *from = reply ? &s->ends[1] : &s->ends[0], *to = reply ? &s->ends[0] : &s->ends[1];
	__u32 flags = e->flags;
	bool changed;
	int error;

	/* An identity that came in a tunnel header, of a pod that is not in the ipcache yet, is better than "world" or
	 * than a CIDR around its address. What the ipcache itself once said is not: it may have taken that back.
	 */
	if (!from->known && flags & CT_TUNNEL && e->identity[0] >= IDENTITY_ALLOCATED_MIN && !(e->identity[0] >> 24))
		from->identity = e->identity[0];
	/* A client outside whom another node gave its own address stays one. */
	if (from->known && flags & CT_TUNNEL && scope_of(e->identity[0]) == SCOPE_WORLD)
		from->identity = e->identity[0];
	error = decide(s, reply);
	/* A proxied connection that is now plainly allowed stays with the proxy; one that must change its proxy ends.
	 * So does the proxy's leg: what waits in the proxy was not judged by the new rules.
	 */
	if (s->leg == LEG_PROXY)
		changed = s->l7 && e->l7 && s->l7 != e->l7;
	else
		changed = s->l7 != e->l7 && (s->l7 || !(flags & CT_PROXIED));
	if (!error && changed)
		error = -DROP_PROXY_NOT_FOUND;
	if (!error && flags & CT_DENIED)
		report(s);
	if (error)
		__sync_fetch_and_or(&e->flags, CT_DENIED);
	else
		__sync_fetch_and_and(&e->flags, ~CT_DENIED);
	e->identity[0] = from->identity;
	e->identity[1] = to->identity;
	e->rule[DIR_EGRESS] = s->rule[DIR_EGRESS];
	e->rule[DIR_INGRESS] = s->rule[DIR_INGRESS];
	e->epoch = s->epoch;
}

/* Whether this sender may report on the quoted packet: its destination may, and routers, which pods are not. What is of the
 * world in the overlay was passed on by a node that was asked for a service.
 */
static __always_inline bool may_report(const struct scratch *s)
{
	bool pod = s->observation == OBS_FROM_POD ||
		   (s->observation == OBS_FROM_OVERLAY && s->ends[0].identity != IDENTITY_REMOTE_NODE &&
		    scope_of(s->ends[0].identity) != SCOPE_WORLD);

	return !pod || addr_equal(&s->p.saddr, &s->p.q_daddr);
}

/* ICMP errors follow the connection of the packet they quote; they never make or refresh a row. */
static __always_inline int track_related(struct scratch *s)
{
	struct pkt *p = &s->p;
	struct ct_entry *e;
	bool embryonic, from_b;

	s->ct_state = CT_STATE_RELATED;
	if (!addr_equal(&p->q_saddr, &p->daddr) || !may_report(s))
		return -DROP_ICMP_UNRELATED;
	from_b = ct_key_set(&s->key, &p->q_saddr, p->q_sport, &p->q_daddr, p->q_dport, p->q_protocol, LEG_DIRECT);
	ct_key_echo(&s->key, p->family, p->q_icmp_type, from_b);
	e = ct_find(s, &embryonic);
	if (!e) {
		s->key.leg = LEG_PROXY;
		e = ct_find(s, &embryonic);
		if (!e)
			return -DROP_ICMP_UNRELATED;
		s->flags = e->flags;
		s->answers = 1;
		return TRACK_TO_SOCKET;
	}
	if (e->flags & CT_DENIED)
		return -DROP_ICMP_UNRELATED;
	s->flags = e->flags;
	s->answers = from_b == !!(e->flags & CT_ORIG_B); /* the quoted packet goes the other way */
	ct_touch(s, e, s->answers, false);
	return e->flags & CT_PROXIED && s->observation != OBS_FROM_HOST ? TRACK_TO_SOCKET : TRACK_FORWARD;
}

/* A server's answer to the proxy: the row is the proxy's leg, and the packet goes against it. */
static __always_inline bool answers_proxy(struct scratch *s, bool from_b)
{
	struct ct_entry *e;
	bool found = false;

	s->key.leg = LEG_PROXY;
	e = bpf_map_lookup_elem(&ct, &s->key);
	if (e && ct_valid(s, e) && from_b != !!(e->flags & CT_ORIG_B)) {
		s->leg = LEG_PROXY;
		s->ct_state = CT_STATE_REPLY;
		s->flags = e->flags;
		s->answers = 1;
		ct_touch(s, e, true, false);
		found = true;
	} else {
		s->key.leg = LEG_DIRECT;
	}
	return found;
}

/* Keeps CT_SERVICE true of the connection's last packet from the originator; 0 or a negated drop reason. A pod may speak
 * with a backend through a service and past it from one port: UDP is answered as it last asked, TCP has one connection.
 */
static __always_inline int track_service(struct scratch *s, struct ct_entry *e)
{
	if (s->dsr && !(e->flags & CT_DSR)) {
		__sync_fetch_and_or(&e->flags, CT_SERVICE | CT_DSR);
	} else if (s->service && !(e->flags & CT_SERVICE)) {
		__sync_fetch_and_or(&e->flags, CT_SERVICE);
	} else if (!s->service && e->flags & CT_SERVICE && s->observation == OBS_FROM_POD) {
		if (s->p.protocol == IPPROTO_TCP)
			return -DROP_NAT_NO_MAPPING;
		__sync_fetch_and_and(&e->flags, ~CT_SERVICE);
	}
	return 0;
}

static __always_inline int track_known(struct scratch *s, struct ct_entry *e, bool reply, bool embryonic)
{
	s->ct_state = reply ? CT_STATE_REPLY : CT_STATE_ESTABLISHED;
	s->answers = reply;
	if (e->epoch != s->epoch && (s->leg == LEG_DIRECT || s->ends[0].known))
		decide_again(s, e, reply);
	s->flags = e->flags;
	if (!reply) {
		int error = track_service(s, e);

		if (error)
			return error;
	}
	if (e->flags & CT_DENIED) {
		s->rule[DIR_EGRESS] = e->rule[DIR_EGRESS];
		s->rule[DIR_INGRESS] = e->rule[DIR_INGRESS];
		return -DROP_POLICY_DENIED;
	}
	ct_touch(s, e, reply, embryonic);
	s->flags = e->flags;
	if (e->flags & CT_PROXIED && !reply) {
		s->l7 = e->l7;
		return TRACK_TO_LISTENER;
	}
	return TRACK_FORWARD;
}

/* A first segment that begins another connection: the row's is over or denied, or it comes from the wrong end, which a
 * row must not let in unasked. A simultaneous open still works where both ends' policies allow it.
 */
static __always_inline bool begins_anew(const struct pkt *p, const struct ct_entry *e, bool reply)
{
	return is_first_segment(p) && (reply || e->flags & CT_DENIED || ct_closed(e->flags));
}

/* Whether the packet, which has no row, answers a client's connection to a service: its row was evicted, and the packet is
 * not its maker. What the client may is asked as ever: the translation came before its policy.
 */
static __always_inline bool answers_client(struct scratch *s)
{
	const struct pkt *p = &s->p;
	struct translation *row;

	if (s->service || is_first_segment(p) || (p->protocol != IPPROTO_TCP && p->protocol != IPPROTO_UDP))
		return false;
	translation_key_set(&s->back, &p->daddr, p->dport, &p->saddr, p->sport, p->protocol, TRANSLATION_BACK);
	row = bpf_map_lookup_elem(&translations, &s->back);
	if (!row || row->expires <= s->now || ct_closed(row->state))
		return false;
	if (s->observation == OBS_FROM_POD && row->flags & TRANSLATION_DSR)
		s->dsr = 1; /* so that the client's packets find the new row to be theirs */
	return true;
}

/* Whether the packet, which has no row, goes on with a client's connection that this node answers for another (DSR): its row
 * was evicted, and only first segments name the frontend. Then as if this one did.
 */
static __always_inline bool follows_dsr(struct scratch *s)
{
	const struct pkt *p = &s->p;
	struct translation *row;

	if (s->dsr || p->protocol != IPPROTO_TCP || is_first_segment(p) ||
	    (s->observation != OBS_FROM_NETDEV && s->observation != OBS_FROM_OVERLAY))
		return false;
	translation_key_set(&s->back, &p->saddr, p->sport, &p->daddr, p->dport, p->protocol, TRANSLATION_BACK);
	row = bpf_map_lookup_elem(&translations, &s->back);
	if (!row || row->expires <= s->now || !(row->flags & TRANSLATION_DSR) || ct_closed(row->state))
		return false;
	s->frontend = row->addr;
	s->frontend_port = row->port;
	s->service = row->service;
	s->dsr = 1;
	return true;
}

/* Returns enum track_result or a negated drop reason. s->epoch was read before the ends were resolved. */
static __noinline int track(struct scratch *s, int mode)
{
	struct pkt *p;
	struct ct_entry *e;
	bool embryonic, from_b, reply = false, anew = false, answers;
	int error;

	if (!s)
		return -DROP_INTERNAL;
	p = &s->p;
	s->answers = 0;
	if (is_nd(p)) /* answered or ignored at its hook; no way into a pod */
		return -DROP_UNSUPPORTED_DEST;
	s->leg = mode == TRACK_FROM_PROXY ? LEG_PROXY : LEG_DIRECT;
	if (p->quoted)
		return track_related(s);
	from_b = ct_key_set(&s->key, &p->saddr, p->sport, &p->daddr, p->dport, p->protocol, s->leg);
	ct_key_echo(&s->key, p->family, p->icmp_type, from_b);
	e = ct_find(s, &embryonic);
	if (e) {
		reply = from_b != !!(e->flags & CT_ORIG_B);
		anew = begins_anew(p, e, reply);
	}
	/* The proxy is asked by nobody: a first segment is no answer to it. */
	if (mode == TRACK_POLICY && (e ? e->flags & CT_PROXIED && reply : !is_first_segment(p))) {
		if (answers_proxy(s, from_b))
			return TRACK_TO_SOCKET;
		if (e) /* a server that speaks into a connection the proxy serves */
			return -DROP_PROXY_NOT_FOUND;
	}
	if (mode == TRACK_REPLY && !(e && reply && !anew))
		return -DROP_INVALID_SIP;
	if (!e && (mode == TRACK_DSR || mode == TRACK_POLICY) && follows_dsr(s))
		mode = TRACK_POLICY;
	if (mode == TRACK_DSR && !(e && !reply && !anew && e->flags & CT_DSR))
		return -DROP_INVALID_SIP;
	if (e && !anew)
		return track_known(s, e, reply, embryonic);
	if (mode == TRACK_NODE && p->protocol == IPPROTO_TCP && !is_first_segment(p))
		return TRACK_ASK;
	answers = mode == TRACK_POLICY && !e && answers_client(s);
	reply = mode == TRACK_REVERSED || answers;
	s->answers = reply;
	s->ct_state = reply ? CT_STATE_REPLY : CT_STATE_NEW;
	s->flags = reply ? CT_SEEN_REPLY : 0;
	if (s->service || s->dsr || answers)
		s->flags |= s->dsr ? CT_SERVICE | CT_DSR : CT_SERVICE;
	if (mode == TRACK_FROM_PROXY && !s->ends[0].known) /* the redirect knew its identity from the tunnel header */
		return ct_create(s, from_b, false, CT_SEEN_REPLY);
	error = decide(s, reply);
	if (error)
		return error;
	if (mode == TRACK_FROM_PROXY)
		return ct_create(s, from_b, false, CT_SEEN_REPLY);
	if (s->l7 && answers) /* the proxy has the connection, or nobody does */
		return -DROP_PROXY_NOT_FOUND;
	if (s->l7)
		s->flags |= CT_PROXIED;
	if (anew && !s->settled)
		bpf_map_delete_elem(&ct, &s->key); /* only now: a refused attempt leaves the row alone */
	error = ct_create(s, from_b, reply, s->flags);
	if (error)
		return error;
	report(s);
	return s->l7 ? TRACK_TO_LISTENER : TRACK_FORWARD;
}
