/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Direct server return: the frontend travels in the packet, so that the backend's node answers the client by itself.
 *
 * The layouts and numbers are Cilium's. IPv4: an option right behind the fixed header, copied into fragments (RFC 791, 3.1).
 * IPv6: a destination options header (RFC 8200, 4.6) right behind the fixed header; whoever does not know it skips it.
 * See docs/explanation/services.md, "From outside", for who may say what.
 */
#pragma once
#include "packet.h"
#include "neigh.h"

#define DSR_V4_TYPE 0x9a
#define DSR_V6_TYPE 0x1b
#define DSR_V6_LENGTH 20
#define IPV6_HOP_BY_HOP 0
#define IPV6_DESTINATION 60

struct dsr_v4 {
	__u8 type, length;
	__be16 port;
	__be32 addr;
};
_Static_assert(sizeof(struct dsr_v4) == 8, "the option is 8 octets");

struct dsr_v6 {
	__u8 next, units; /* of 8 octets, without the first */
	__u8 type, length;
	__u8 addr[16];
	__be16 port;
	__u16 pad;
};
_Static_assert(sizeof(struct dsr_v6) == 24, "the header is 24 octets");

/* What the frontend takes in the packet, octets. */
static __always_inline __u32 dsr_room(const struct pkt *p)
{
	return p->family == 4 ? sizeof(struct dsr_v4) : sizeof(struct dsr_v6);
}

/* Makes room behind the IP header, or takes it away. Segments that a device will cut keep their payload's size. */
static __always_inline int dsr_adjust(struct __sk_buff *skb, struct pkt *p, __s32 octets)
{
	if (bpf_skb_adjust_room(skb, octets, BPF_ADJ_ROOM_NET, BPF_F_ADJ_ROOM_FIXED_GSO))
		return -DROP_WRITE_ERROR;
	p->l4 += octets;
	p->length += octets;
	return 0;
}

/* The first word of an IPv4 header that grows by so many octets, which may be negative. */
static __always_inline __be32 v4_grown(__be32 word, __s32 octets)
{
	return bpf_htonl(bpf_ntohl(word) + ((octets / 4) << 24) + octets);
}

static __always_inline int dsr_put_v4(struct __sk_buff *skb, struct scratch *s)
{
	struct dsr_v4 option = { .type = DSR_V4_TYPE, .length = sizeof(option) };
	struct pkt *p = &s->p;
	__be32 old, new[3];
	__s64 diff;

	if (p->l4 - p->l3 > 60 - sizeof(option) || bpf_skb_load_bytes(skb, p->l3, &old, sizeof(old)))
		return -DROP_INVALID_PACKET;
	option.port = s->frontend_port;
	option.addr = s->frontend.w[3];
	new[0] = v4_grown(old, sizeof(option));
	__builtin_memcpy(new + 1, &option, sizeof(option));
	if (dsr_adjust(skb, p, sizeof(option)))
		return -DROP_WRITE_ERROR;
	diff = bpf_csum_diff(&old, sizeof(old), new, sizeof(new), 0);
	if (bpf_l3_csum_replace(skb, p->l3 + offsetof(struct iphdr, check), 0, diff, 0) ||
	    bpf_skb_store_bytes(skb, p->l3, new, 4, 0) ||
	    bpf_skb_store_bytes(skb, p->l3 + sizeof(struct iphdr), new + 1, sizeof(option), 0))
		return -DROP_WRITE_ERROR;
	return 0;
}

static __always_inline int dsr_put_v6(struct __sk_buff *skb, struct scratch *s)
{
	struct dsr_v6 header = {
		.units = sizeof(header) / 8 - 1,
		.type = DSR_V6_TYPE,
		.length = DSR_V6_LENGTH,
	};
	__u16 at = s->p.l3 + offsetof(struct ipv6hdr, payload_len);
	struct {
		__be16 length;
		__u8 next, hops;
	} fixed;

	if (bpf_skb_load_bytes(skb, at, &fixed, sizeof(fixed)))
		return -DROP_INVALID_PACKET;
	header.next = fixed.next;
	__builtin_memcpy(header.addr, &s->frontend, sizeof(header.addr));
	header.port = s->frontend_port;
	fixed.next = IPV6_DESTINATION;
	fixed.length = bpf_htons(bpf_ntohs(fixed.length) + sizeof(header));
	if (dsr_adjust(skb, &s->p, sizeof(header)) || bpf_skb_store_bytes(skb, at, &fixed, sizeof(fixed), 0) ||
	    bpf_skb_store_bytes(skb, s->p.l3 + sizeof(struct ipv6hdr), &header, sizeof(header), 0))
		return -DROP_WRITE_ERROR;
	return 0;
}

/* Whether the headers have room for the frontend. */
static __always_inline bool dsr_fits(struct __sk_buff *skb, const struct pkt *p)
{
	__u8 next;

	if (p->family == 4)
		return p->l4 - p->l3 <= 60 - sizeof(struct dsr_v4);
	/* Hop-by-hop options come first (RFC 8200, 4.1). */
	return !bpf_skb_load_bytes(skb, p->l3 + offsetof(struct ipv6hdr, nexthdr), &next, 1) && next != IPV6_HOP_BY_HOP;
}

/* Puts s->frontend into the packet. 0 or a negated drop reason. */
static __noinline int dsr_put(struct __sk_buff *skb, struct scratch *s)
{
	if (!s)
		return -DROP_INTERNAL;
	return s->p.family == 4 ? dsr_put_v4(skb, s) : dsr_put_v6(skb, s);
}

static __always_inline int dsr_take_v4(struct __sk_buff *skb, struct scratch *s)
{
	struct pkt *p = &s->p;
	struct dsr_v4 option;
	__be32 old[3], new;
	__s64 diff;

	if (p->l4 - p->l3 < sizeof(struct iphdr) + sizeof(option) || bpf_skb_load_bytes(skb, p->l3, old, 4) ||
	    bpf_skb_load_bytes(skb, p->l3 + sizeof(struct iphdr), old + 1, sizeof(option)))
		return 0;
	__builtin_memcpy(&option, old + 1, sizeof(option));
	if (option.type != DSR_V4_TYPE || option.length != sizeof(option))
		return 0;
	addr_set_v4(&s->frontend, option.addr);
	s->frontend_port = option.port;
	new = v4_grown(old[0], -(__s32)sizeof(option));
	diff = bpf_csum_diff(old, sizeof(old), &new, sizeof(new), 0);
	if (bpf_l3_csum_replace(skb, p->l3 + offsetof(struct iphdr, check), 0, diff, 0) ||
	    bpf_skb_store_bytes(skb, p->l3, &new, 4, 0) || dsr_adjust(skb, p, -(__s32)sizeof(option)))
		return -DROP_WRITE_ERROR;
	return 1;
}

static __always_inline int dsr_take_v6(struct __sk_buff *skb, struct scratch *s)
{
	__u16 at = s->p.l3 + offsetof(struct ipv6hdr, payload_len);
	struct dsr_v6 header;
	struct {
		__be16 length;
		__u8 next, hops;
	} fixed;

	if (bpf_skb_load_bytes(skb, at, &fixed, sizeof(fixed)) || fixed.next != IPV6_DESTINATION ||
	    bpf_skb_load_bytes(skb, s->p.l3 + sizeof(struct ipv6hdr), &header, sizeof(header)))
		return 0;
	if (header.units != sizeof(header) / 8 - 1 || header.type != DSR_V6_TYPE || header.length != DSR_V6_LENGTH)
		return 0;
	__builtin_memcpy(&s->frontend, header.addr, sizeof(header.addr));
	s->frontend_port = header.port;
	fixed.next = header.next;
	fixed.length = bpf_htons(bpf_ntohs(fixed.length) - sizeof(header));
	if (bpf_skb_store_bytes(skb, at, &fixed, sizeof(fixed), 0) || dsr_adjust(skb, &s->p, -(__s32)sizeof(header)))
		return -DROP_WRITE_ERROR;
	return 1;
}

/* Whether the packet names a frontend, where dsr_take() looks for it. */
static __noinline int dsr_named(struct __sk_buff *skb, struct scratch *s)
{
	__u8 option[2], next;

	if (!s)
		return 0;
	if (s->p.family == 4)
		return s->p.l4 - s->p.l3 >= sizeof(struct iphdr) + sizeof(struct dsr_v4) &&
		       !bpf_skb_load_bytes(skb, s->p.l3 + sizeof(struct iphdr), option, sizeof(option)) &&
		       option[0] == DSR_V4_TYPE && option[1] == sizeof(struct dsr_v4);
	return !bpf_skb_load_bytes(skb, s->p.l3 + offsetof(struct ipv6hdr, nexthdr), &next, 1) &&
	       next == IPV6_DESTINATION &&
	       !bpf_skb_load_bytes(skb, s->p.l3 + sizeof(struct ipv6hdr) + 2, option, sizeof(option)) &&
	       option[0] == DSR_V6_TYPE && option[1] == DSR_V6_LENGTH;
}

/* Takes the frontend out of the packet: 1: in s->frontend; 0: it has none; else a negated drop reason. */
static __noinline int dsr_take(struct __sk_buff *skb, struct scratch *s)
{
	if (!s)
		return -DROP_INTERNAL;
	return s->p.family == 4 ? dsr_take_v4(skb, s) : dsr_take_v6(skb, s);
}
