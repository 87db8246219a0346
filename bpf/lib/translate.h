/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Packets of connections to services: the frontend's address becomes the backend's on the way out, and the backend's the
 * frontend's on the way back. See docs/explanation/services.md, "Packets".
 *
 * Two rows a connection. OUT is keyed by client and frontend, BACK by client and backend; each holds what the other is
 * keyed by, so a packet of either direction makes the other row anew where it was evicted.
 */
#pragma once
#include "conntrack.h"
#include "nat.h"

#define SERVICE_TRIES 4
#define VIA_SHIFT 30 /* of nanoseconds: a next hop is asked for again about every second */

enum service_out_result {
	SERVICE_OUT_NONE = 0,       /* no service: the packet is as it was */
	SERVICE_OUT_TRANSLATED = 1, /* to a backend */
	SERVICE_OUT_REJECT = 2,     /* nobody serves it: reject_answer() */
};

enum seat {
	SEAT_TAKEN = 0, /* another connection has these two ends: an answer could not be told from its answers */
	SEAT_FREE = 1,
	SEAT_OWN = 2, /* this very connection is remembered */
};

static __always_inline bool has_service_ports(const struct pkt *p)
{
	return p->protocol == IPPROTO_TCP || p->protocol == IPPROTO_UDP || p->protocol == IPPROTO_SCTP;
}

/* TCP that was begun before this packet. Later fragments count as such: their datagram's first one came before them. */
static __always_inline bool is_under_way(const struct pkt *p)
{
	return p->protocol == IPPROTO_TCP && !is_first_segment(p);
}

static __always_inline struct translation *translation_find(const struct translation_key *key, __u64 now)
{
	struct translation *row = bpf_map_lookup_elem(&translations, key);

	return row && row->expires > now ? row : NULL;
}

/* s->back for the client of s->out and s->chosen. A pod that reaches itself answers to the gateway. */
static __always_inline void back_key_set(struct scratch *s)
{
	union addr client = s->out.client;

	if (s->chosen.flags & TRANSLATION_HAIRPIN)
		client = gateway_of(s->p.family);
	translation_key_set(&s->back, &client, s->out.client_port, &s->chosen.addr, s->chosen.port, s->out.protocol,
			    TRANSLATION_BACK);
}

static __always_inline bool is_back_of(const struct translation *back, const struct translation_key *out)
{
	return addr_equal(&back->addr, &out->peer) && back->port == out->peer_port;
}

/* ---- which backend ------------------------------------------------------------------------------------------- */

/* Whether the backend of a row may have one more packet of this connection. TCP that is under way stays with its backend
 * to the end, even after that has left the service; anything else goes to a backend that serves.
 */
static __always_inline bool still_serves(const struct pkt *p, const struct translation *row)
{
	struct backend *to;

	if (is_under_way(p))
		return true;
	if (is_first_segment(p) && ct_closed(row->state))
		return false;
	to = bpf_map_lookup_elem(&backends, &row->backend);
	if (!to || !addr_equal(&to->addr, &row->addr) || to->port != row->port)
		return false;
	return !(to->flags & BACKEND_TERMINATING) || !is_first_segment(p);
}

/* Whether the connection has a backend already: then in s->chosen. */
static __always_inline bool backend_known(struct scratch *s)
{
	struct translation *row = translation_find(&s->out, s->now);

	if (!row || !still_serves(&s->p, row))
		return false;
	s->chosen = *row;
	return true;
}

/* Whether a conntrack row is one that may still have packets; `since`: its backend's. */
static __always_inline bool ct_lives(const struct scratch *s, const struct ct_entry *e, __u64 since)
{
	return e && e->expires > s->now && e->born >= s->ends[0].since && e->born >= since && !ct_closed(e->flags);
}

/* The epoch since which a local pod has its address; 0: it is none. */
static __always_inline __u64 addr_since(const union addr *addr)
{
	struct local_addr *local = bpf_map_lookup_elem(&local_addrs, addr);
	struct endpoint *ep = local ? bpf_map_lookup_elem(&endpoints, &local->ifindex) : NULL;

	return ep && !(local->flags & LOCAL_HOST) ? ep->since : 0;
}

/* The conntrack row between the packet's source and `to`; NULL: none that lives. `from_b`: of the key s->key. */
static __always_inline struct ct_entry *ct_between(struct scratch *s, const union addr *to, __be16 port, bool *from_b)
{
	struct ct_entry *e;
	__u64 since;

	*from_b = ct_key_set(&s->key, &s->p.saddr, s->p.sport, to, port, s->p.protocol, LEG_DIRECT);
	e = bpf_map_lookup_elem(&ct, &s->key);
	since = e ? addr_since(to) : 0;
	if (ct_lives(s, e, since))
		return e;
	e = bpf_map_lookup_elem(&ct_new, &s->key);
	since = e ? addr_since(to) : 0;
	return ct_lives(s, e, since) ? e : NULL;
}

/* Whether the packet belongs to a connection with the very address that is a frontend's: it answers what came from there,
 * or it is TCP that is older than the service.
 */
static __noinline int speaks_directly(struct scratch *s)
{
	struct ct_entry *e;
	bool from_b;

	if (!s)
		return 0;
	e = ct_between(s, &s->p.daddr, s->p.dport, &from_b);
	if (!e || is_first_segment(&s->p))
		return 0;
	return is_under_way(&s->p) || from_b != !!(e->flags & CT_ORIG_B);
}

/* Returns enum seat for s->chosen. */
static __always_inline int seat_of(struct scratch *s)
{
	struct translation *back;
	struct ct_entry *e;
	bool from_b;

	back_key_set(s);
	back = translation_find(&s->back, s->now);
	if (back && is_back_of(back, &s->out))
		return SEAT_OWN;
	if (back && !ct_closed(back->state))
		return SEAT_TAKEN;
	if (s->chosen.flags & TRANSLATION_HAIRPIN)
		return SEAT_FREE; /* nothing else speaks as the gateway */
	e = ct_between(s, &s->chosen.addr, s->chosen.port, &from_b);
	if (!e)
		return SEAT_FREE;
	if (!(e->flags & CT_SERVICE))
		return SEAT_TAKEN;
	return is_under_way(&s->p) ? SEAT_OWN : SEAT_FREE; /* both its rows were evicted: it is most likely this one */
}

/* One choice for s->wish, in s->chosen. Returns enum service_result; with SERVICE_FOUND, `seat` says what it is worth. */
static __noinline int choose(struct scratch *s, const struct frontend *f, int *seat)
{
	int result;

	if (!s || !f || !seat)
		return -DROP_INTERNAL;
	result = service_select_from(&s->wish, f, s->now);
	if (result != SERVICE_FOUND)
		return result;
	s->chosen.addr = s->wish.to.addr;
	s->chosen.port = s->wish.to.port;
	s->chosen.backend = s->wish.backend;
	s->chosen.service = s->wish.service;
	s->chosen.state = 0;
	s->chosen.via = 0;
	s->chosen.flags = s->wish.to.flags & BACKEND_LOCAL ? TRANSLATION_LOCAL : 0;
	/* From outside it is another node that is given itself: its answer must come back here like any other. */
	if (s->observation != OBS_FROM_NETDEV && addr_equal(&s->p.saddr, &s->chosen.addr))
		s->chosen.flags |= TRANSLATION_HAIRPIN;
	*seat = seat_of(s);
	return SERVICE_FOUND;
}

/* A backend for a connection that has none, in s->chosen. Returns enum service_out_result or a negated drop reason.
 *
 * TCP that is under way and of which both rows are lost goes to the backend that conntrack remembers, if a few choices
 * find it (with one backend, Maglev or affinity the first does); else to the first choice.
 */
static __always_inline int choose_fitting(struct scratch *s, const struct frontend *f)
{
	bool under_way = is_under_way(&s->p);
	int result, seat = SEAT_TAKEN;

	for (int i = 0; i < SERVICE_TRIES; i++) {
		result = choose(s, f, &seat);
		if (result == SERVICE_REJECT)
			return SERVICE_OUT_REJECT;
		if (result != SERVICE_FOUND)
			return result < 0 ? result : -DROP_NO_SERVICE;
		if (seat == SEAT_OWN || (seat == SEAT_FREE && (!under_way || i == SERVICE_TRIES - 1)))
			return SERVICE_OUT_TRANSLATED;
		/* What nobody remembers goes where every node's Maglev table sends it. */
		if (under_way && i == SERVICE_TRIES - 2)
			s->wish.hash = nat_hash(&s->p);
		else
			s->wish.hash = s->wish.hash * 0x9e3779b1U + 1;
	}
	return -DROP_NAT_NO_MAPPING;
}

static __always_inline void wish_set(struct scratch *s, __u8 scope)
{
	struct wish *w = &s->wish;

	w->addr = s->p.daddr;
	w->port = has_service_ports(&s->p) ? s->p.dport : 0;
	w->protocol = has_service_ports(&s->p) ? s->p.protocol : 0;
	w->scope = scope;
	w->node = s->kind == DEST_HOST                        ? WISH_THIS_NODE :
		  s->kind == DEST_NATIVE && s->dest_node == 1 ? WISH_OTHER_NODE :
								WISH_NO_NODE;
	w->socket = 0;
	w->pad = 0;
	w->client = s->p.saddr;
	w->hash = nat_hash(&s->p);
}

/* What is asked of an address: for TCP that is under way not whether it has services at other ports, which costs all
 * traffic with the world a look-up a packet.
 */
static __always_inline struct frontend *frontend_of(const struct scratch *s)
{
	const struct wish *w = &s->wish;
	struct frontend_key key = { .addr = w->addr, .port = w->port, .protocol = w->protocol, .scope = w->scope };

	if (!w->protocol && w->node) /* a node answers for itself what no service is asked for */
		return NULL;
	if (!w->protocol || (is_under_way(&s->p) && !w->node))
		return bpf_map_lookup_elem(&frontends, &key);
	return frontend_find(w);
}

/* Whether the frontend's source ranges let the client in. */
static __noinline int is_in_ranges(struct scratch *s, const struct frontend *f)
{
	struct source_range_key range = { .prefixlen = 32 + 128 };

	if (!s || !f)
		return 0;
	if (!(f->flags & FRONTEND_SOURCE_RANGES))
		return 1;
	range.service = f->service;
	range.addr = s->p.saddr;
	return !!bpf_map_lookup_elem(&source_ranges, &range);
}

/* Whether a frontend is for this client: 1, 0 (it passes the frontend by), or a negated drop reason. */
static __noinline int is_for_client(struct scratch *s, const struct frontend *f)
{
	if (!s || !f)
		return -DROP_INTERNAL;
	if (speaks_directly(s))
		return 0;
	if (f->flags & FRONTEND_SKIPS && s->client_netns) {
		struct skip_key skip = { .netns = s->client_netns, .addr = s->p.daddr, .port = s->p.dport };

		skip.protocol = s->p.protocol;
		if (bpf_map_lookup_elem(&skips, &skip))
			return 0;
	}
	return is_in_ranges(s, f) ? 1 : -DROP_NOT_IN_SRC_RANGE;
}

/* The backend for the packet, in s->chosen. Returns enum service_out_result or a negated drop reason. */
static __noinline int backend_of(struct scratch *s, __u8 scope)
{
	bool under_way;
	struct frontend *f;
	int result;

	if (!s)
		return -DROP_INTERNAL;
	under_way = is_under_way(&s->p);
	translation_key_set(&s->out, &s->p.saddr, s->p.sport, &s->p.daddr, s->p.dport, s->p.protocol, TRANSLATION_OUT);
	if (under_way && backend_known(s))
		return SERVICE_OUT_TRANSLATED;
	wish_set(s, scope);
	f = frontend_of(s);
	if (!f)
		return SERVICE_OUT_NONE;
	if (!under_way && has_service_ports(&s->p) && backend_known(s)) /* the ranges may have changed since */
		return is_in_ranges(s, f) ? SERVICE_OUT_TRANSLATED : -DROP_NOT_IN_SRC_RANGE;
	result = is_for_client(s, f);
	return result > 0 ? choose_fitting(s, f) : result;
}

/* ---- the rows ------------------------------------------------------------------------------------------------ */

static __always_inline int translation_put(const struct translation_key *key, struct translation *fresh)
{
	return bpf_map_update_elem(&translations, key, fresh, BPF_ANY) ? -DROP_NAT_NO_MAPPING : 0;
}

/* Makes or refreshes both rows of s->out and s->chosen. 0 or a negated drop reason. */
static __noinline int rows_of_client(struct scratch *s)
{
	struct translation *out, *back;
	__u32 state;
	int error;

	if (!s)
		return -DROP_INTERNAL;
	back_key_set(s);
	out = translation_find(&s->out, s->now);
	if (out && (out->backend != s->chosen.backend || !addr_equal(&out->addr, &s->chosen.addr)))
		out = NULL;
	back = translation_find(&s->back, s->now);
	if (back && !is_back_of(back, &s->out)) {
		if (!ct_closed(back->state)) { /* evicted, and another connection has its ends since: it chooses anew */
			bpf_map_delete_elem(&translations, &s->out);
			return -DROP_NAT_NO_MAPPING;
		}
		back = NULL;
	}
	state = s->chosen.state | (back ? back->state : 0);
	if (is_first_segment(&s->p) && ct_closed(state))
		state = 0;
	state = ct_flags_after(state, s->p.tcp_flags, false);
	/* The answers do not come by here, but a client that goes on has had one. */
	if (s->chosen.flags & TRANSLATION_DSR && is_under_way(&s->p))
		state |= CT_SEEN_REPLY;
	s->chosen.state = state;
	s->chosen.expires = s->now + ct_life(s->p.protocol, state);
	if (out) {
		if ((out->expires ^ s->chosen.expires) >> VIA_SHIFT)
			out->via = s->chosen.via = 0;
		out->state = state;
		out->expires = s->chosen.expires;
	} else {
		s->chosen.via = 0;
		s->made = 1;
		error = translation_put(&s->out, &s->chosen);
		if (error)
			return error;
	}
	if (back) {
		back->state = state;
		back->expires = s->chosen.expires;
		return 0;
	}
	/* As BACK: the same row with the frontend in it. */
	s->chosen.addr = s->out.peer;
	s->chosen.port = s->out.peer_port;
	error = translation_put(&s->back, &s->chosen);
	s->chosen.addr = s->back.peer;
	s->chosen.port = s->back.peer_port;
	return error;
}

/* Refreshes both rows for a packet of the backend, whose row s->chosen is a copy of; makes OUT anew if it is gone. */
static __always_inline void rows_of_backend(struct scratch *s, struct translation *back)
{
	const union addr *client = s->chosen.flags & TRANSLATION_HAIRPIN ? &s->back.peer : &s->back.client;
	struct translation *out;
	__u32 state;

	translation_key_set(&s->out, client, s->back.client_port, &s->chosen.addr, s->chosen.port, s->back.protocol,
			    TRANSLATION_OUT);
	out = translation_find(&s->out, s->now);
	state = ct_flags_after(s->chosen.state | (out ? out->state : 0), s->p.tcp_flags, true);
	s->chosen.expires = s->now + ct_life(s->p.protocol, state);
	back->state = state;
	back->expires = s->chosen.expires;
	if (!out && s->chosen.flags & TRANSLATION_DSR)
		return; /* the client's packets have theirs on the node that was asked */
	if (!out) {
		s->chosen.state = state;
		s->chosen.addr = s->back.peer;
		s->chosen.port = s->back.peer_port;
		translation_put(&s->out, &s->chosen);
		s->chosen.addr = s->out.peer;
		s->chosen.port = s->out.peer_port;
	} else if (out->backend == s->chosen.backend) { /* else the client has another backend by now */
		out->state = state;
		out->expires = s->chosen.expires;
	}
}

/* ---- the packets --------------------------------------------------------------------------------------------- */

/* An address and port of the packet itself. SCTP's checksum covers its ports and is not ours to make. */
static __noinline int rewrite_end(struct __sk_buff *skb, struct scratch *s, int source, const union addr *addr,
				  __be16 port)
{
	union addr to;
	int error;

	if (!s || !addr)
		return -DROP_INTERNAL;
	to = *addr;
	if (s->p.protocol == IPPROTO_SCTP && port != (source ? s->p.sport : s->p.dport))
		return -DROP_UNKNOWN_L4;
	error = rewrite_addr(skb, &s->p, source, &to);
	return error ?: rewrite_port(skb, &s->p, source, port);
}

/* An address and port of the packet that an ICMP error quotes; the outer addresses stay. */
static __noinline int rewrite_quoted(struct __sk_buff *skb, struct scratch *s, int source, const union addr *addr,
				     __be16 port)
{
	if (!s || !addr)
		return -DROP_INTERNAL;
	return quoted_end(skb, &s->p, source, addr, port);
}

/* Whether a pod's ICMP error is about what was sent to the pod: it is no router. True of what is no pod's error. */
static __always_inline bool reports_own(const struct scratch *s)
{
	return !s->p.quoted || s->observation != OBS_FROM_POD || addr_equal(&s->p.q_daddr, &s->p.saddr);
}

/* An ICMP error of the client about what the frontend sent it: about what the backend sent, and to the backend. */
static __always_inline int service_out_quoted(struct __sk_buff *skb, struct scratch *s)
{
	struct pkt *p = &s->p;
	struct translation *row;
	union addr gateway;
	int error;

	if (!addr_equal(&p->q_saddr, &p->daddr) || !reports_own(s))
		return SERVICE_OUT_NONE;
	translation_key_set(&s->out, &p->q_daddr, p->q_dport, &p->q_saddr, p->q_sport, p->q_protocol, TRANSLATION_OUT);
	row = translation_find(&s->out, s->now);
	if (!row)
		return SERVICE_OUT_NONE;
	s->chosen = *row;
	error = rewrite_quoted(skb, s, true, &s->chosen.addr, s->chosen.port);
	if (!error)
		error = rewrite_addr(skb, p, false, &s->chosen.addr);
	if (!error && s->chosen.flags & TRANSLATION_HAIRPIN) {
		gateway = gateway_of(p->family);
		error = rewrite_quoted(skb, s, false, &gateway, p->q_dport);
		if (!error)
			error = rewrite_addr(skb, p, true, &gateway);
	}
	return error ?: SERVICE_OUT_TRANSLATED;
}

/* A client's parsed packet to an address that may be a frontend's, s->kind and s->dest_node resolved for it. Returns enum
 * service_out_result or a negated drop reason. Translated: packet and s->p are as the backend is to get them, s->chosen
 * has the backend, s->frontend and s->service what was asked; both rows are written.
 */
static __noinline int service_out(struct __sk_buff *skb, struct scratch *s, __u8 scope)
{
	union addr gateway;
	int result;

	if (!s)
		return -DROP_INTERNAL;
	if (s->p.quoted) {
		result = service_out_quoted(skb, s);
	} else {
		result = backend_of(s, scope);
		if (result != SERVICE_OUT_TRANSLATED)
			return result;
		if (s->p.protocol == IPPROTO_SCTP && s->chosen.port != s->p.dport)
			return -DROP_UNKNOWN_L4;
		result = rows_of_client(s);
		if (!result)
			result = rewrite_end(skb, s, false, &s->chosen.addr, s->chosen.port);
		if (!result && s->chosen.flags & TRANSLATION_HAIRPIN) {
			gateway = gateway_of(s->p.family);
			result = addr_zero(&gateway) ? -DROP_NO_ROUTE : rewrite_addr(skb, &s->p, true, &gateway);
		}
		result = result ?: SERVICE_OUT_TRANSLATED;
	}
	if (result == SERVICE_OUT_TRANSLATED) {
		s->frontend = s->out.peer;
		s->frontend_port = s->out.peer_port;
		s->service = s->chosen.service;
	}
	return result;
}

/* Takes back what service_out() did, so that what is told the client speaks of the frontend. */
static __noinline int service_undo(struct __sk_buff *skb, struct scratch *s)
{
	if (!s)
		return -DROP_INTERNAL;
	s->service = 0;
	return rewrite_end(skb, s, false, &s->frontend, s->frontend_port);
}

/* An ICMP error about what the client sent to the backend: about what it sent to the frontend, and from there if it is the
 * backend's own. s->back and s->chosen are set.
 */
static __always_inline int service_back_quoted(struct __sk_buff *skb, struct scratch *s)
{
	bool own = addr_equal(&s->p.saddr, &s->back.peer);
	int error = rewrite_quoted(skb, s, false, &s->chosen.addr, s->chosen.port);

	if (!error && own)
		error = rewrite_addr(skb, &s->p, true, &s->chosen.addr);
	if (!error && s->chosen.flags & TRANSLATION_HAIRPIN) {
		error = rewrite_quoted(skb, s, true, &s->back.peer, s->back.client_port);
		if (!error)
			error = rewrite_addr(skb, &s->p, false, &s->back.peer);
	}
	return error;
}

/* A backend's packet on its last step to the client. 1: it comes from the frontend now; 0: it has no row; else a negated
 * drop reason.
 */
static __noinline int service_back(struct __sk_buff *skb, struct scratch *s)
{
	struct translation *row;
	struct pkt *p;
	int error;

	if (!s)
		return -DROP_INTERNAL;
	p = &s->p;
	if (p->quoted)
		translation_key_set(&s->back, &p->q_saddr, p->q_sport, &p->q_daddr, p->q_dport, p->q_protocol,
				    TRANSLATION_BACK);
	else if (has_service_ports(p))
		translation_key_set(&s->back, &p->daddr, p->dport, &p->saddr, p->sport, p->protocol, TRANSLATION_BACK);
	else
		return 0;
	row = translation_find(&s->back, s->now);
	if (!row)
		return 0;
	s->chosen = *row;
	if (p->quoted) {
		error = service_back_quoted(skb, s);
		return error ?: 1;
	}
	rows_of_backend(s, row);
	error = rewrite_end(skb, s, true, &s->chosen.addr, s->chosen.port);
	if (!error && s->chosen.flags & TRANSLATION_HAIRPIN)
		error = rewrite_addr(skb, p, false, &s->back.peer);
	return error ?: 1;
}
