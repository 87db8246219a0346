/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Services at the socket: a process that connects or sends to a frontend does so to a backend, and is told that it talks
 * to the frontend. No packet is touched. See docs/explanation/services.md.
 *
 * The programs see every socket that was made in the node's cgroup. Those of the node's own network namespace are the
 * host's, all others are pods'. IPv4 programs also see AF_INET6 sockets that send to mapped addresses, IPv6 programs
 * mapped addresses themselves: both are the same `union addr`.
 */
#pragma once
#include "../lib/node.h"
#include "../lib/service.h"

#define ECONNREFUSED 111
#define EADDRINUSE 98
/* As long as a conntrack row of UDP lives: so long a silent socket's datagrams keep their backend. */
#define SOCKET_FLOW_LIFE (60 * SECOND)

enum sock_result {
	SOCK_UNCHANGED = 0,
	SOCK_CHANGED = 1, /* `w.to` takes the place of the address */
	SOCK_REFUSED = 2, /* the call fails, its error is set */
};

/* One call that names an address: `w.addr`, `w.port`. */
struct sock_call {
	struct wish w;
	__u64 socket; /* cookie */
	__u64 netns;  /* cookie */
	bool connect; /* else a datagram of a socket that is not connected to it */
	bool known;   /* the backend is that of an earlier datagram */
};

static __always_inline union addr sock_addr_v4(__be32 address)
{
	union addr a = {};

	a.w[2] = bpf_htonl(0xffff);
	a.w[3] = address;
	return a;
}

static __always_inline union addr sock_addr_v6(const struct bpf_sock_addr *ctx)
{
	union addr a;

	a.w[0] = ctx->user_ip6[0];
	a.w[1] = ctx->user_ip6[1];
	a.w[2] = ctx->user_ip6[2];
	a.w[3] = ctx->user_ip6[3];
	return a;
}

static __always_inline void sock_set_v6(struct bpf_sock_addr *ctx, const union addr *a, __be16 port)
{
	ctx->user_ip6[0] = a->w[0];
	ctx->user_ip6[1] = a->w[1];
	ctx->user_ip6[2] = a->w[2];
	ctx->user_ip6[3] = a->w[3];
	ctx->user_port = port;
}

/* :: and 0.0.0.0, which the stack takes for the loopback address. */
static __always_inline bool addr_is_any(const union addr *a)
{
	return !a->d[0] && !a->w[3] && (!a->w[2] || a->w[2] == bpf_htonl(0xffff));
}

static __always_inline bool addr_is_loopback(const union addr *a)
{
	if (addr_is_v4(a))
		return (a->w[3] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000);
	return !a->d[0] && !a->w[2] && a->w[3] == bpf_htonl(1);
}

/* Whether node ports and host ports are reached by the address: enum wish_node. A pod's loopback is its own. */
static __always_inline __u8 sock_is_node(const union addr *a, bool host)
{
	struct local_addr *local;
	struct ipcache_entry *entry;

	if (addr_is_loopback(a) || addr_is_any(a))
		return host ? WISH_THIS_NODE : WISH_NO_NODE;
	local = bpf_map_lookup_elem(&local_addrs, a);
	if (local)
		return local->flags & LOCAL_HOST ? WISH_THIS_NODE : WISH_NO_NODE;
	entry = ipcache_find(a);
	return entry && entry->flags & IPCACHE_NODE ? WISH_OTHER_NODE : WISH_NO_NODE;
}

static __always_inline bool sock_skips(const struct sock_call *c)
{
	struct skip_key key = { .netns = c->netns, .addr = c->w.addr, .port = c->w.port, .protocol = c->w.protocol };

	return bpf_map_lookup_elem(&skips, &key);
}

/* Takes the backend of the socket's last datagram to the frontend, as long as it is one. Its number may be another
 * backend's by now, so the address is compared.
 */
static __always_inline bool sock_same_backend(struct sock_call *c, const struct frontend *f, __u64 now)
{
	struct socket_peer_key key = {
		.socket = c->socket, .addr = c->w.addr, .port = c->w.port, .protocol = c->w.protocol
	};
	struct socket_flow *flow = bpf_map_lookup_elem(&socket_flows, &key);
	struct backend *to;
	__u32 number;

	if (!flow || !f->count || flow->service != f->service || flow->used + SOCKET_FLOW_LIFE <= now)
		return false;
	number = flow->backend;
	to = bpf_map_lookup_elem(&backends, &number);
	if (!to || to->port != flow->port || !addr_equal(&to->addr, &flow->addr))
		return false;
	if (flow->used + SECOND <= now)
		flow->used = now;
	c->w.backend = number;
	c->w.service = f->service;
	c->w.to = *to;
	c->known = true;
	return true;
}

static __always_inline int sock_select(struct sock_call *c)
{
	bool host = c->netns == config_host_netns;
	__u64 now = expiry_clock();
	struct frontend *f;

	if (!host && (!config_socket_pods || addr_is_any(&c->w.addr)))
		return SERVICE_NONE;
	c->w.node = sock_is_node(&c->w.addr, host);
	f = frontend_find(&c->w);
	if (!f || f->flags & FRONTEND_SOURCE_RANGES)
		return SERVICE_NONE;
	if (f->flags & FRONTEND_SKIPS && sock_skips(c))
		return SERVICE_NONE;
	if (!c->connect && sock_same_backend(c, f, now))
		return SERVICE_FOUND;
	c->w.client.d[1] = c->netns;
	c->w.socket = 1;
	c->w.hash = bpf_get_prandom_u32(); /* the connection has no source port yet */
	return service_select_from(&c->w, f, now);
}

/* Remembers what recvmsg() and getpeername() say instead of the backend, and which backend the next datagram gets. */
static __always_inline void sock_remember(const struct sock_call *c)
{
	struct socket_peer_key key = {
		.socket = c->socket, .addr = c->w.to.addr, .port = c->w.to.port, .protocol = c->w.protocol
	};
	struct socket_peer peer = {
		.addr = c->w.addr, .port = c->w.port, .service = c->w.service, .backend = c->w.backend
	};
	struct socket_peer *last = c->known ? bpf_map_lookup_elem(&socket_peers, &key) : NULL;

	if (!last || last->port != peer.port || !addr_equal(&last->addr, &peer.addr))
		bpf_map_update_elem(&socket_peers, &key, &peer, BPF_ANY);
	if (!c->connect && !c->known) {
		struct socket_flow flow = {
			.addr = c->w.to.addr,
			.port = c->w.to.port,
			.service = c->w.service,
			.backend = c->w.backend,
			.used = expiry_clock(),
		};

		key.addr = c->w.addr;
		key.port = c->w.port;
		bpf_map_update_elem(&socket_flows, &key, &flow, BPF_ANY);
	}
}

static __always_inline void sock_report(const struct sock_call *c, __u8 verdict, __u8 reason)
{
	struct event *e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);

	if (!e) {
		__u32 zero = 0;
		__u64 *lost = bpf_map_lookup_elem(&events_lost, &zero);

		if (lost)
			*lost += 1;
		return;
	}
	__builtin_memset(e, 0, sizeof(*e));
	e->time = bpf_ktime_get_boot_ns();
	e->daddr = c->w.to.addr;
	e->dport = c->w.to.port;
	e->protocol = c->w.protocol;
	e->type = EVENT_SOCKET;
	e->verdict = verdict;
	e->reason = reason;
	e->observation = OBS_SOCKET;
	e->packets = c->socket;
	e->bytes = c->netns;
	e->frontend = c->w.addr;
	e->frontend_port = c->w.port;
	e->service = c->w.service;
	bpf_ringbuf_submit(e, 0);
}

/* Whether the address has services, but not this one. Libraries find out which source address they would have by
 * connecting a UDP socket to the port of a TCP service: nothing is sent, so nothing is refused.
 */
static __always_inline bool sock_only_asks(const struct sock_call *c)
{
	struct frontend_key key = { .addr = c->w.addr, .port = c->w.port, .protocol = c->w.protocol };

	return c->connect && c->w.protocol == IPPROTO_UDP && !c->w.node && !bpf_map_lookup_elem(&frontends, &key);
}

/* A UDP socket may connect again, and now has chosen the address itself. */
static __always_inline void sock_forget(const struct sock_call *c)
{
	struct socket_peer_key key = {
		.socket = c->socket, .addr = c->w.addr, .port = c->w.port, .protocol = c->w.protocol
	};

	if (bpf_map_lookup_elem(&socket_peers, &key))
		bpf_map_delete_elem(&socket_peers, &key);
}

/* Returns enum sock_result. */
static __always_inline int sock_translate(struct bpf_sock_addr *ctx, struct sock_call *c)
{
	int result;

	c->w.protocol = ctx->protocol;
	c->w.port = ctx->user_port;
	/* SCTP: no kernel up to 6.18 asks here, its packets are translated in tc. */
	if (ctx->protocol != IPPROTO_TCP && ctx->protocol != IPPROTO_UDP && ctx->protocol != IPPROTO_SCTP)
		return SOCK_UNCHANGED;
	c->socket = bpf_get_socket_cookie(ctx);
	c->netns = bpf_get_netns_cookie(ctx);
	result = sock_select(c);
	if (result == SERVICE_REJECT && !sock_only_asks(c)) {
		count(DROP_NO_SERVICE, DIR_EGRESS, 0);
		sock_report(c, VERDICT_DROPPED, DROP_NO_SERVICE);
		bpf_set_retval(-ECONNREFUSED);
		return SOCK_REFUSED;
	}
	/* SERVICE_DROP: tc decides. A backend of the other family would need another socket. */
	if (result != SERVICE_FOUND || addr_is_v4(&c->w.to.addr) != addr_is_v4(&c->w.addr)) {
		if (c->connect && c->w.protocol == IPPROTO_UDP)
			sock_forget(c);
		return SOCK_UNCHANGED;
	}
	sock_remember(c);
	if (!c->known)
		sock_report(c, VERDICT_FORWARDED, DROP_NONE);
	return SOCK_CHANGED;
}

static __always_inline int sock_call_v4(struct bpf_sock_addr *ctx, bool connect)
{
	struct sock_call c = { .w.addr = sock_addr_v4(ctx->user_ip4), .connect = connect };
	int result = sock_translate(ctx, &c);

	if (result == SOCK_CHANGED) {
		ctx->user_ip4 = c.w.to.addr.w[3];
		ctx->user_port = c.w.to.port;
	}
	return result != SOCK_REFUSED;
}

static __always_inline int sock_call_v6(struct bpf_sock_addr *ctx, bool connect)
{
	struct sock_call c = { .w.addr = sock_addr_v6(ctx), .connect = connect };
	int result = sock_translate(ctx, &c);

	if (result == SOCK_CHANGED)
		sock_set_v6(ctx, &c.w.to.addr, c.w.to.port);
	return result != SOCK_REFUSED;
}

SEC("cgroup/connect4")
int connect4(struct bpf_sock_addr *ctx)
{
	return sock_call_v4(ctx, true);
}

SEC("cgroup/connect6")
int connect6(struct bpf_sock_addr *ctx)
{
	return sock_call_v6(ctx, true);
}

SEC("cgroup/sendmsg4")
int sendmsg4(struct bpf_sock_addr *ctx)
{
	return sock_call_v4(ctx, false);
}

SEC("cgroup/sendmsg6")
int sendmsg6(struct bpf_sock_addr *ctx)
{
	return sock_call_v6(ctx, false);
}

/* ---- the way back ----------------------------------------------------------------------------------------------- */

/* What the socket asked for when it was given this address; NULL: it was given none. */
static __always_inline struct socket_peer *sock_asked(struct bpf_sock_addr *ctx, const union addr *a)
{
	struct socket_peer_key key = {
		.socket = bpf_get_socket_cookie(ctx), .addr = *a, .port = ctx->user_port, .protocol = ctx->protocol
	};

	return bpf_map_lookup_elem(&socket_peers, &key);
}

static __always_inline int sock_back_v4(struct bpf_sock_addr *ctx)
{
	union addr a = sock_addr_v4(ctx->user_ip4);
	struct socket_peer *peer = sock_asked(ctx, &a);

	if (peer) {
		ctx->user_ip4 = peer->addr.w[3];
		ctx->user_port = peer->port;
	}
	return 1;
}

static __always_inline int sock_back_v6(struct bpf_sock_addr *ctx)
{
	union addr a = sock_addr_v6(ctx);
	struct socket_peer *peer = sock_asked(ctx, &a);

	if (peer)
		sock_set_v6(ctx, &peer->addr, peer->port);
	return 1;
}

SEC("cgroup/recvmsg4")
int recvmsg4(struct bpf_sock_addr *ctx)
{
	return sock_back_v4(ctx);
}

SEC("cgroup/recvmsg6")
int recvmsg6(struct bpf_sock_addr *ctx)
{
	return sock_back_v6(ctx);
}

SEC("cgroup/getpeername4")
int getpeername4(struct bpf_sock_addr *ctx)
{
	return sock_back_v4(ctx);
}

SEC("cgroup/getpeername6")
int getpeername6(struct bpf_sock_addr *ctx)
{
	return sock_back_v6(ctx);
}

/* The row of a connection goes with its socket, so that those of long ones are not pushed out of the map by short ones. */
SEC("cgroup/sock_release")
int sock_release(struct bpf_sock *ctx)
{
	struct socket_peer_key key = { .port = ctx->dst_port, .protocol = ctx->protocol };

	if (!key.port)
		return 1;
	if (ctx->family == AF_INET) {
		key.addr = sock_addr_v4(ctx->dst_ip4);
	} else if (ctx->family == AF_INET6) {
		key.addr.w[0] = ctx->dst_ip6[0];
		key.addr.w[1] = ctx->dst_ip6[1];
		key.addr.w[2] = ctx->dst_ip6[2];
		key.addr.w[3] = ctx->dst_ip6[3];
	} else {
		return 1;
	}
	key.socket = bpf_get_socket_cookie(ctx);
	if (bpf_map_lookup_elem(&socket_peers, &key))
		bpf_map_delete_elem(&socket_peers, &key);
	return 1;
}

/* ---- ports of the node -------------------------------------------------------------------------------------------- */

/* Whether a node port has this number: a process that bound it would wait for clients that never come. */
static __always_inline bool bind_is_node_port(__u16 port, __u8 protocol, bool v4)
{
	struct frontend_key key = { .port = bpf_htons(port), .protocol = protocol, .scope = FRONTEND_CLUSTER };

	if (v4)
		key.addr.w[2] = bpf_htonl(0xffff);
	return bpf_map_lookup_elem(&frontends, &key);
}

/* Returns whether the port may be bound; `v6`: for the IPv6 one too, or only. */
static __always_inline int bind_check(struct bpf_sock *ctx, bool v4, bool v6)
{
	__u16 port = ctx->src_port;

	if (port < config_node_port_min || port > config_node_port_max)
		return 1;
	if (ctx->protocol != IPPROTO_TCP && ctx->protocol != IPPROTO_UDP)
		return 1;
	if (bpf_get_netns_cookie(ctx) != config_host_netns)
		return 1;
	if ((v4 && bind_is_node_port(port, ctx->protocol, true)) ||
	    (v6 && bind_is_node_port(port, ctx->protocol, false))) {
		bpf_set_retval(-EADDRINUSE);
		return 0;
	}
	return 1;
}

SEC("cgroup/post_bind4")
int post_bind4(struct bpf_sock *ctx)
{
	return bind_check(ctx, true, false);
}

SEC("cgroup/post_bind6")
int post_bind6(struct bpf_sock *ctx)
{
	union addr a;

	a.w[0] = ctx->src_ip6[0];
	a.w[1] = ctx->src_ip6[1];
	a.w[2] = ctx->src_ip6[2];
	a.w[3] = ctx->src_ip6[3];
	if (addr_is_v4(&a))
		return bind_check(ctx, true, false);
	return bind_check(ctx, addr_is_any(&a), true);
}
