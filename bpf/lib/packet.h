/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* From octets to `struct pkt`: the only place that reads headers. After it both families look alike.
 *
 * Everything is bounds-checked by the load helper; what is truncated or malformed is refused with a reason.
 */
#pragma once
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <linux/tcp.h>
#include <linux/udp.h>
#include <stddef.h>
#include <stdbool.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include "config.h"
#include "drop.h"
#include "mark.h"
#include "maps.h"
#include "service.h"

#define ETH_HLEN_ ((__u16)sizeof(struct ethhdr))
#define IPV6_EXT_MAX 6
#define PROTO_ICMPV6 58

/* <linux/icmp.h> pulls in libc; these are RFC 792 and RFC 4443. */
#define ICMP_ECHOREPLY 0
#define ICMP_DEST_UNREACH 3
#define ICMP_SOURCE_QUENCH 4
#define ICMP_ECHO 8
#define ICMP_TIME_EXCEEDED 11
#define ICMP_PARAMETERPROB 12
#define ICMP_FRAG_NEEDED 4
#define ICMPV6_PKT_TOOBIG 2
#define ICMPV6_ECHO_REQUEST 128
#define ICMPV6_ECHO_REPLY 129

struct icmp_head {
	__u8 type;
	__u8 code;
	__sum16 check;
	__be16 id; /* echo */
	__be16 sequence;
};

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

enum frag_state { FRAG_NONE = 0, FRAG_FIRST = 1, FRAG_LATER = 2 };

/* A parsed packet. Lives in the per-CPU scratch map, never on the stack (old verifiers; 512 octets). */
struct pkt {
	union addr saddr;
	union addr daddr;
	__be16 sport; /* ICMP echo: the identifier, in both */
	__be16 dport;
	__u8 family; /* 4 or 6 */
	__u8 protocol;
	__u8 tcp_flags;
	__u8 icmp_type;
	__u8 icmp_code;
	__u8 frag; /* enum frag_state */
	__u8 dont_fragment;
	__u8 quoted; /* an ICMP error; q_* hold the packet it quotes */
	__u16 l3;    /* offsets from the frame's start */
	__u16 l4;
	__u32 length; /* octets from the network header on, as the header says */
	__be32 frag_id;
	__u16 l4_header; /* octets of the TCP or UDP header, else 0 */
	__u16 q_l3;
	__u16 q_l4;
	__u8 q_protocol;
	__u8 q_icmp_type;
	__u8 next; /* IPv6 walk: the next header */
	union addr q_saddr;
	union addr q_daddr;
	__be16 q_sport;
	__be16 q_dport;
	__u32 walk_error;
};

enum dest_kind { DEST_POD = 0, DEST_HOST = 1, DEST_TUNNEL = 2, DEST_NATIVE = 3 };

/* One end of the packet's connection, as far as this node knows it. */
struct end {
	__u32 identity;
	__u32 id; /* endpoint id, 0: no pod of this node */
	__u32 policy[DIR_MAX];
	__u32 options;
	__u32 known; /* the identity is first hand: own row, tunnel header, or an ipcache row of a pod or node */
	__u64 since;
};

/* What one run of a program works with. Programs of one CPU do not nest, so one row is enough. */
struct scratch {
	struct pkt p;
	struct end ends[2]; /* source, destination of this packet */
	struct ct_key key;
	struct ct_entry fresh;
	__u64 epoch;
	__u64 now; /* expiry_clock() */
	__u32 ifindex;
	__u32 l7;
	__u32 rule[DIR_MAX];
	__u8 observation;
	__u8 ct_state;
	__u8 leg;
	__u8 settled;   /* a new row of `key` belongs in `ct` */
	__u8 answers;   /* the packet goes against the originator's direction: a reply, or an error about its packets */
	__u8 direction; /* that denied */
	__u8 audit;
	__u8 in_tunnel;     /* came by the overlay */
	__u8 kind;          /* enum dest_kind */
	__u8 dest_node;     /* the destination is a node */
	__u8 macs[12];      /* Ethernet destination and source towards the local pod */
	__u32 dest_ifindex; /* of the local pod */
	__u32 flags;        /* enum ct_flag of the row that was found or made */
	union addr tunnel;  /* underlay address of the destination's node, zero: none */
	__u8 octets[256];   /* for building packets */
	/* What translate.h works with. */
	struct wish wish;
	struct translation_key out;  /* client to frontend */
	struct translation_key back; /* backend to client */
	struct translation chosen;   /* as the row of `out`: the backend; `flags` say where it is */
	union addr frontend;         /* that the packet was sent to, while `service` is set */
	__be16 frontend_port;
	__u8 made;          /* the packet is the first of its translation */
	__u8 dsr;           /* `frontend` came in the packet: its node asks this one to answer the client */
	__u32 service;      /* number, of a packet that was translated to its backend; else 0 */
	__u64 client_netns; /* cookie of the sending pod's network namespace, 0: not known */
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct scratch);
} scratch SEC(".maps");

/* The clock of `expires`, nanoseconds, CLOCK_MONOTONIC as of the last tick: reading the hardware's clock costs more than
 * finding a connection, and the shortest life is 10 s.
 */
static __always_inline __u64 expiry_clock(void)
{
	return bpf_ktime_get_coarse_ns();
}

static __always_inline struct scratch *scratch_get(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&scratch, &zero);
}

static __always_inline bool addr_equal(const union addr *x, const union addr *y)
{
	return x->d[0] == y->d[0] && x->d[1] == y->d[1];
}

static __always_inline bool addr_zero(const union addr *x)
{
	return !(x->d[0] | x->d[1]);
}

static __always_inline void addr_set_v4(union addr *to, __be32 v4)
{
	to->d[0] = 0;
	to->w[2] = bpf_htonl(0xffff);
	to->w[3] = v4;
}

static __always_inline union addr gateway_of(__u8 family)
{
	return family == 4 ? config_addr(&config_gateway_v4) : config_addr(&config_gateway_v6);
}

static __always_inline void translation_key_set(struct translation_key *key, const union addr *client,
						__be16 client_port, const union addr *peer, __be16 peer_port,
						__u8 protocol, __u8 dir)
{
	key->client = *client;
	key->peer = *peer;
	key->client_port = client_port;
	key->peer_port = peer_port;
	key->protocol = protocol;
	key->dir = dir;
	key->pad = 0;
}

static __always_inline bool addr_is_v4(const union addr *x)
{
	return !x->d[0] && x->w[2] == bpf_htonl(0xffff);
}

static __always_inline bool is_icmp(const struct pkt *p)
{
	return p->protocol == (p->family == 4 ? IPPROTO_ICMP : PROTO_ICMPV6);
}

/* To nobody in particular; broadcast and the unspecified address too. */
static __always_inline bool is_multicast(const struct pkt *p)
{
	if (p->family == 4)
		return (p->daddr.w[3] & bpf_htonl(0xf0000000)) == bpf_htonl(0xe0000000) ||
		       p->daddr.w[3] == bpf_htonl(0xffffffff) || !p->daddr.w[3];
	return p->daddr.b[0] == 0xff || addr_zero(&p->daddr);
}

static __always_inline bool icmp_is_echo(__u8 family, __u8 type)
{
	return family == 4 ? type == ICMP_ECHO || type == ICMP_ECHOREPLY :
			     type == ICMPV6_ECHO_REQUEST || type == ICMPV6_ECHO_REPLY;
}

static __always_inline bool is_echo_request(const struct pkt *p)
{
	return is_icmp(p) && p->icmp_type == (p->family == 4 ? ICMP_ECHO : ICMPV6_ECHO_REQUEST);
}

static __always_inline bool icmp_is_error(__u8 family, __u8 type)
{
	if (family == 4)
		return type == ICMP_DEST_UNREACH || type == ICMP_TIME_EXCEEDED || type == ICMP_PARAMETERPROB ||
		       type == ICMP_SOURCE_QUENCH;
	return type >= 1 && type <= 4; /* RFC 4443: unreachable, too big, time exceeded, parameter problem */
}

/* Whether the packet reaches from `at` that many octets on: what comes after its length is the frame's padding. */
static __always_inline bool pkt_holds(const struct pkt *p, __u16 at, __u32 octets)
{
	return (__u32)(at - p->l3) + octets <= p->length;
}

/* Ports of the packet that an ICMP error quotes (RFC 792, RFC 4443): at least 8 octets of it are there. */
static __always_inline int parse_quoted_ports(struct __sk_buff *skb, struct pkt *p)
{
	__be16 ports[4];

	if (!pkt_holds(p, p->q_l4, sizeof(ports)) || bpf_skb_load_bytes(skb, p->q_l4, ports, sizeof(ports)))
		return -DROP_INVALID_PACKET;
	if (p->q_protocol == (p->family == 4 ? IPPROTO_ICMP : PROTO_ICMPV6)) {
		p->q_icmp_type = *(__u8 *)ports;
		if (icmp_is_echo(p->family, p->q_icmp_type))
			p->q_sport = p->q_dport = ports[2]; /* identifier */
		else
			p->q_sport = p->q_dport = bpf_htons(p->q_icmp_type);
		return 0;
	}
	if (p->q_protocol == IPPROTO_TCP || p->q_protocol == IPPROTO_UDP || p->q_protocol == IPPROTO_SCTP) {
		p->q_sport = ports[0];
		p->q_dport = ports[1];
	}
	return 0;
}

static __always_inline int parse_quoted(struct __sk_buff *skb, struct pkt *p)
{
	p->q_l3 = p->l4 + 8;
	p->q_sport = p->q_dport = 0;
	if (p->family == 4) {
		struct iphdr ip;

		if (bpf_skb_load_bytes(skb, p->q_l3, &ip, sizeof(ip)) || ip.version != 4 || ip.ihl < 5)
			return -DROP_INVALID_PACKET;
		addr_set_v4(&p->q_saddr, ip.saddr);
		addr_set_v4(&p->q_daddr, ip.daddr);
		p->q_protocol = ip.protocol;
		p->q_l4 = p->q_l3 + ip.ihl * 4;
		if (ip.frag_off & bpf_htons(0x1fff)) { /* a later fragment has no ports: no connection is found */
			p->quoted = 1;
			return 0;
		}
	} else {
		struct ipv6hdr ip;

		if (bpf_skb_load_bytes(skb, p->q_l3, &ip, sizeof(ip)) || ip.version != 6)
			return -DROP_INVALID_PACKET;
		__builtin_memcpy(&p->q_saddr, &ip.saddr, 16);
		__builtin_memcpy(&p->q_daddr, &ip.daddr, 16);
		p->q_protocol = ip.nexthdr; /* with extension headers: no connection has that protocol, so unrelated */
		p->q_l4 = p->q_l3 + sizeof(ip);
	}
	p->quoted = 1;
	return parse_quoted_ports(skb, p);
}

static __always_inline int parse_l4(struct __sk_buff *skb, struct pkt *p)
{
	if (p->frag == FRAG_LATER)
		return 0;
	switch (p->protocol) {
	case IPPROTO_TCP: {
		struct tcphdr tcp;

		if (!pkt_holds(p, p->l4, sizeof(tcp)) || bpf_skb_load_bytes(skb, p->l4, &tcp, sizeof(tcp)) ||
		    tcp.doff < 5)
			return -DROP_INVALID_PACKET;
		if (p->frag == FRAG_NONE && !pkt_holds(p, p->l4, tcp.doff * 4))
			return -DROP_INVALID_PACKET;
		p->sport = tcp.source;
		p->dport = tcp.dest;
		p->tcp_flags = ((__u8 *)&tcp)[13];
		p->l4_header = tcp.doff * 4;
		return 0;
	}
	case IPPROTO_UDP:
	case IPPROTO_SCTP: {
		struct udphdr udp; /* SCTP's common header begins alike and is longer */

		if (!pkt_holds(p, p->l4, sizeof(udp)) || bpf_skb_load_bytes(skb, p->l4, &udp, sizeof(udp)))
			return -DROP_INVALID_PACKET;
		p->sport = udp.source;
		p->dport = udp.dest;
		p->l4_header = sizeof(udp);
		return 0;
	}
	case IPPROTO_ICMP:
	case PROTO_ICMPV6: {
		struct icmp_head icmp;

		if (!is_icmp(p))
			return -DROP_UNKNOWN_L4; /* ICMP of the other family */
		if (!pkt_holds(p, p->l4, sizeof(icmp)) || bpf_skb_load_bytes(skb, p->l4, &icmp, sizeof(icmp)))
			return -DROP_INVALID_PACKET;
		if (p->frag != FRAG_NONE && icmp_is_error(p->family, icmp.type))
			return -DROP_INVALID_PACKET; /* they are made to fit (RFC 1812, RFC 4443) */
		p->icmp_type = icmp.type;
		p->icmp_code = icmp.code;
		if (icmp_is_echo(p->family, icmp.type))
			p->sport = p->dport = icmp.id;
		else if (icmp_is_error(p->family, icmp.type))
			return parse_quoted(skb, p);
		else /* each type is a connection of its own */
			p->sport = p->dport = bpf_htons(icmp.type);
		return 0;
	}
	default:
		return 0; /* tracked by addresses and protocol */
	}
}

/* A later fragment that begins inside the TCP header would rewrite what was judged (RFC 3128). */
static __always_inline bool overlaps_tcp(const struct pkt *p, __u8 protocol, __u32 offset)
{
	return p->frag == FRAG_LATER && protocol == IPPROTO_TCP && offset < sizeof(struct tcphdr);
}

static __always_inline int parse_v4(struct __sk_buff *skb, struct pkt *p)
{
	struct iphdr ip;
	__u16 offset;

	if (bpf_skb_load_bytes(skb, ETH_HLEN_, &ip, sizeof(ip)) || ip.version != 4 || ip.ihl < 5)
		return -DROP_INVALID_PACKET;
	addr_set_v4(&p->saddr, ip.saddr);
	addr_set_v4(&p->daddr, ip.daddr);
	p->length = bpf_ntohs(ip.tot_len);
	if (!p->length && skb->gso_segs) /* larger than the field can say */
		p->length = skb->len - ETH_HLEN_;
	if (p->length < (__u32)ip.ihl * 4 || p->length > skb->len - ETH_HLEN_)
		return -DROP_INVALID_PACKET;
	p->family = 4;
	p->protocol = ip.protocol;
	p->l4 = ETH_HLEN_ + ip.ihl * 4;
	p->frag_id = ip.id;
	offset = bpf_ntohs(ip.frag_off);
	p->dont_fragment = !!(offset & 0x4000);
	if (offset & 0x1fff)
		p->frag = FRAG_LATER;
	else if (offset & 0x2000)
		p->frag = FRAG_FIRST;
	if (overlaps_tcp(p, ip.protocol, (offset & 0x1fff) * 8))
		return -DROP_INVALID_PACKET;
	return 0;
}

struct walk {
	struct __sk_buff *skb;
	struct pkt *p;
};

/* One extension header (RFC 8200, 4). Returns 1 when the walk is over. State lives in the scratch row. */
static __always_inline int ext_step(struct __sk_buff *skb, struct pkt *p)
{
	__u8 head[8];

	switch (p->next) {
	case 0:  /* hop-by-hop */
	case 43: /* routing */
	case 60: /* destination options */
		if (bpf_skb_load_bytes(skb, p->l4, head, 2))
			goto bad;
		p->l4 += (head[1] + 1) * 8;
		break;
	case 44: /* fragment */
		if (p->frag || bpf_skb_load_bytes(skb, p->l4, head, 8))
			goto bad;
		if (((head[2] << 8) | head[3]) & 0xfff8)
			p->frag = FRAG_LATER;
		else if (head[3] & 1)
			p->frag = FRAG_FIRST;
		if (overlaps_tcp(p, head[0], ((head[2] << 8) | head[3]) & 0xfff8))
			goto bad;
		__builtin_memcpy(&p->frag_id, head + 4, 4);
		p->l4 += 8;
		break;
	case 51: /* authentication header, RFC 4302: length in 4-octet units less 2 */
		if (bpf_skb_load_bytes(skb, p->l4, head, 2))
			goto bad;
		p->l4 += (head[1] + 2) * 4;
		break;
	default:
		p->protocol = p->next;
		return 1;
	}
	p->next = head[0];
	if (p->frag == FRAG_LATER) { /* what follows is payload */
		p->protocol = p->next;
		return 1;
	}
	return 0;
bad:
	p->walk_error = 1;
	return 1;
}

static __always_inline int parse_v6(struct __sk_buff *skb, struct pkt *p)
{
	struct ipv6hdr ip;
	int done = 0;

	if (bpf_skb_load_bytes(skb, ETH_HLEN_, &ip, sizeof(ip)) || ip.version != 6)
		return -DROP_INVALID_PACKET;
	__builtin_memcpy(&p->saddr, &ip.saddr, 16);
	__builtin_memcpy(&p->daddr, &ip.daddr, 16);
	p->length = bpf_ntohs(ip.payload_len) + sizeof(ip);
	if (!ip.payload_len && skb->gso_segs)
		p->length = skb->len - ETH_HLEN_;
	if (p->length > skb->len - ETH_HLEN_)
		return -DROP_INVALID_PACKET;
	if (addr_is_v4(&p->saddr) || addr_is_v4(&p->daddr))
		return -DROP_INVALID_PACKET; /* mapped addresses have no place on the wire (RFC 4942, 2.2) */
	p->family = 6;
	p->dont_fragment = 1;
	p->next = ip.nexthdr;
	p->l4 = ETH_HLEN_ + sizeof(ip);
	p->walk_error = 0;
#pragma unroll
	for (int i = 0; i < IPV6_EXT_MAX + 1; i++) {
		if (!done)
			done = ext_step(skb, p);
	}
	if (!done || p->walk_error || !pkt_holds(p, p->l4, 0))
		return -DROP_EXT_HEADERS;
	return 0;
}

/* Returns 0, or the negated drop reason. The frame starts with an Ethernet header. */
static __noinline int pkt_parse(struct __sk_buff *skb, struct pkt *p)
{
	int error;

	if (!p)
		return -DROP_INTERNAL;
	p->sport = p->dport = 0;
	p->tcp_flags = p->icmp_type = p->icmp_code = 0;
	p->frag = FRAG_NONE;
	p->quoted = 0;
	p->l4_header = 0;
	p->frag_id = 0;
	p->l3 = ETH_HLEN_;
	if (skb->protocol == bpf_htons(ETH_P_IP))
		error = parse_v4(skb, p);
	else if (skb->protocol == bpf_htons(ETH_P_IPV6))
		error = parse_v6(skb, p);
	else
		return -DROP_UNSUPPORTED_L3;
	return error ?: parse_l4(skb, p);
}
