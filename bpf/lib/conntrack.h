/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Conntrack: one row a connection, expiry at look-up. See docs/adr/0004-conntrack-and-epochs.md. */
#pragma once
#include "event.h"
#include "packet.h"

#define SECONDS 1000000000ULL
#define CT_LIFE_HALF_OPEN (60 * SECONDS)
#define CT_LIFE_TCP (8000 * SECONDS)
#define CT_LIFE_CLOSING (10 * SECONDS)
#define CT_LIFE_REPLIED (180 * SECONDS)

/* Lexical order of the ends as two big-endian halves: any total order will do, as long as it is one. */
static __always_inline bool first_is_lower(const union addr *x, __be16 xport, const union addr *y, __be16 yport)
{
	if (x->d[0] != y->d[0])
		return x->d[0] < y->d[0];
	if (x->d[1] != y->d[1])
		return x->d[1] < y->d[1];
	return xport <= yport;
}

/* Fills the key for a packet from (x, xport) to (y, yport); returns whether the source is end b. */
static __always_inline bool ct_key_set(struct ct_key *key, const union addr *x, __be16 xport, const union addr *y,
				       __be16 yport, __u8 protocol, __u8 leg)
{
	bool lower = first_is_lower(x, xport, y, yport);

	key->a = lower ? *x : *y;
	key->b = lower ? *y : *x;
	key->aport = lower ? xport : yport;
	key->bport = lower ? yport : xport;
	key->protocol = protocol;
	key->leg = leg;
	key->echo = 0;
	key->pad = 0;
	return !lower;
}

/* An echo's row is of who asks: a request never passes as the answer to one of the other end. */
static __always_inline void ct_key_echo(struct ct_key *key, __u8 family, __u8 type, bool from_b)
{
	if (key->protocol == (family == 4 ? IPPROTO_ICMP : PROTO_ICMPV6) && icmp_is_echo(family, type))
		key->echo = from_b == (type == ICMP_ECHO || type == ICMPV6_ECHO_REQUEST) ? 2 : 1;
}

/* Whether the row still speaks for these ends: not expired, not a former owner's. */
static __always_inline bool ct_valid(const struct scratch *s, const struct ct_entry *e)
{
	return e->expires > s->now && e->born >= s->ends[0].since && e->born >= s->ends[1].since;
}

/* The row of s->key, NULL if there is none that is valid. `embryonic` tells in which table it stands, s->settled whether
 * a connection that takes its place stands in `ct`.
 */
static __always_inline struct ct_entry *ct_find(struct scratch *s, bool *embryonic)
{
	struct ct_entry *e = bpf_map_lookup_elem(&ct, &s->key);

	*embryonic = false;
	s->settled = !!e;
	if (e && ct_valid(s, e))
		return e;
	/* A dead row must not hide the connection that uses its ports again. */
	e = bpf_map_lookup_elem(&ct_new, &s->key);
	if (!e || !ct_valid(s, e))
		return NULL;
	*embryonic = true;
	s->settled = 0;
	return e;
}

static __always_inline __u64 ct_life(__u8 protocol, __u32 flags)
{
	if (protocol == IPPROTO_TCP) {
		if (flags & CT_RST || (flags & (CT_FIN_ORIG | CT_FIN_REPLY)) == (CT_FIN_ORIG | CT_FIN_REPLY))
			return CT_LIFE_CLOSING;
		return flags & CT_SEEN_REPLY ? CT_LIFE_TCP : CT_LIFE_HALF_OPEN;
	}
	return protocol == IPPROTO_UDP && flags & CT_SEEN_REPLY ? CT_LIFE_REPLIED : CT_LIFE_HALF_OPEN;
}

static __always_inline bool ct_closed(__u32 flags)
{
	return flags & CT_RST || (flags & (CT_FIN_ORIG | CT_FIN_REPLY)) == (CT_FIN_ORIG | CT_FIN_REPLY);
}

static __always_inline bool is_first_segment(const struct pkt *p)
{
	return p->protocol == IPPROTO_TCP && p->frag != FRAG_LATER && (p->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
}

/* Counts one packet. Atomic: another CPU may have one of the same direction. */
static __always_inline void ct_account(struct ct_entry *e, bool reply, __u32 octets)
{
	__u32 index = reply ? 1 : 0;

	__sync_fetch_and_add(&e->packets[index], 1);
	__sync_fetch_and_add(&e->bytes[index], octets);
}

/* What one more packet makes of a row's flags; `tcp_flags`: 0 for other protocols. */
static __always_inline __u32 ct_flags_after(__u32 flags, __u8 tcp_flags, bool reply)
{
	if (reply)
		flags |= CT_SEEN_REPLY;
	if (tcp_flags & TCP_FIN)
		flags |= reply ? CT_FIN_REPLY : CT_FIN_ORIG;
	if (tcp_flags & TCP_RST)
		flags |= CT_RST;
	return flags;
}

/* Gives a row new flags and a new life. */
static __always_inline void ct_refresh(struct ct_entry *e, __u32 before, __u32 flags, __u8 protocol, __u64 now)
{
	if (flags != before) /* bits only: another CPU may deny the connection at this moment */
		__sync_fetch_and_or(&e->flags, flags & ~before);
	e->expires = now + ct_life(protocol, flags);
}

/* The first answer of a connection: moves its row where half-open floods and port scans cannot reach. */
static __always_inline void ct_promote(const struct ct_key *key, const struct ct_entry *e)
{
	if (!bpf_map_update_elem(&ct, key, e, BPF_ANY))
		bpf_map_delete_elem(&ct_new, key);
}

/* Accounts one packet of an existing row; `reply`: its direction. */
static __always_inline void ct_touch(struct scratch *s, struct ct_entry *e, bool reply, bool embryonic)
{
	struct pkt *p = &s->p;
	__u32 before = e->flags, flags;

	ct_account(e, reply, p->length);
	if (p->quoted)
		return;
	flags = ct_flags_after(before, p->tcp_flags, reply);
	ct_refresh(e, before, flags, p->protocol, s->now);
	if (!ct_closed(before) && ct_closed(flags)) {
		__builtin_memcpy(&s->fresh, e, sizeof(s->fresh));
		s->rule[DIR_EGRESS] = e->rule[DIR_EGRESS];
		s->rule[DIR_INGRESS] = e->rule[DIR_INGRESS];
		s->l7 = e->l7;
		event_send(s, EVENT_END, VERDICT_FORWARDED, 0);
	}
	if (embryonic && reply && !ct_closed(flags))
		ct_promote(&s->key, e);
}

/* Makes the row of s->key for a packet whose source is end b if `from_b`; `reply`: its destination is the originator. */
static __always_inline int ct_create(struct scratch *s, bool from_b, bool reply, __u32 flags)
{
	struct ct_entry *e = &s->fresh;
	struct pkt *p = &s->p;
	long error;

	__builtin_memset(e, 0, sizeof(*e));
	if (from_b != reply)
		flags |= CT_ORIG_B;
	if (s->in_tunnel)
		flags |= CT_TUNNEL;
	if (p->protocol == IPPROTO_TCP && p->tcp_flags & TCP_RST)
		flags |= CT_RST;
	e->flags = flags;
	e->epoch = s->epoch;
	e->born = s->epoch;
	e->expires = s->now + ct_life(p->protocol, flags);
	e->packets[reply ? 1 : 0] = 1;
	e->bytes[reply ? 1 : 0] = p->length;
	e->identity[0] = reply ? s->ends[1].identity : s->ends[0].identity;
	e->identity[1] = reply ? s->ends[0].identity : s->ends[1].identity;
	e->rule[DIR_EGRESS] = s->rule[DIR_EGRESS];
	e->rule[DIR_INGRESS] = s->rule[DIR_INGRESS];
	e->l7 = s->l7;
	/* In the place of a connection that is over it pushes out no other: it need not move after its first answer. */
	if (s->leg == LEG_PROXY || s->settled)
		error = bpf_map_update_elem(&ct, &s->key, e, BPF_ANY);
	else
		error = bpf_map_update_elem(&ct_new, &s->key, e, BPF_ANY);
	return error ? -DROP_CT_CREATE_FAILED : 0;
}
