// SPDX-License-Identifier: Apache-2.0
/*
 * UDP frames into a device, as fast as one core makes them and whatever is behind the device forwards them.
 *
 *   framegen DEVICE MILLISECONDS CPU drop|stack FRAME      prints one JSON object
 *
 * FRAME: 42 octets or more in hexadecimal: Ethernet, IPv4 without options, UDP with a checksum of zero. An XDP program in
 * live-frame mode writes its headers anew each time, since frames are used again with what their receivers wrote; it draws the
 * last six bits of the source port, so there are 64 connections. The frames leave by XDP_REDIRECT: the device's other end
 * needs an XDP program or `ethtool -K DEVICE gro on`. What comes back on the device is counted: `drop` lets an XDP program drop
 * it, which frames need that never became an skb; `stack` leaves it to the stack. The time is that of the kernel's loop,
 * which sends and has what it sent forwarded: the set-up of a call takes 20 ms. Exit 1: a system call failed.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/bpf.h>
#include <net/if.h>
#include <sched.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define HEADERS 42
#define SOURCE_PORT_LOW 35 // of the frame: its last octet
#define CONNECTIONS 64
#define FRAMES_A_CALL 32768
#define MAX_FRAME 1500

static unsigned char frame[MAX_FRAME];

static _Noreturn void die(const char *what)
{
	fprintf(stderr, "framegen: %s: %s\n", what, strerror(errno));
	exit(1);
}

static int bpf(int command, union bpf_attr *attr)
{
	return (int)syscall(SYS_bpf, command, attr, sizeof(*attr));
}

static int load(const struct bpf_insn *code, size_t count)
{
	static char log[16384];
	union bpf_attr attr = {
		.prog_type = BPF_PROG_TYPE_XDP,
		.insns = (uintptr_t)code,
		.insn_cnt = (uint32_t)count,
		.license = (uintptr_t)"GPL",
		.log_buf = (uintptr_t)log,
		.log_size = sizeof(log),
		.log_level = 1,
	};
	int fd = bpf(BPF_PROG_LOAD, &attr);

	if (fd < 0) {
		fputs(log, stderr);
		die("BPF_PROG_LOAD");
	}
	return fd;
}

#define OP(c, d, s, o, i) \
	((struct bpf_insn){ .code = (c), .dst_reg = (d), .src_reg = (s), .off = (int16_t)(o), .imm = (int32_t)(i) })

/* r6: the frame. Writes the headers, draws the source port's last bits, redirects. */
static int generator(int ifindex)
{
	struct bpf_insn code[64];
	size_t n = 0;

	code[n++] = OP(BPF_LDX | BPF_MEM | BPF_W, 6, 1, offsetof(struct xdp_md, data), 0);
	code[n++] = OP(BPF_LDX | BPF_MEM | BPF_W, 2, 1, offsetof(struct xdp_md, data_end), 0);
	code[n++] = OP(BPF_ALU64 | BPF_MOV | BPF_X, 3, 6, 0, 0);
	code[n++] = OP(BPF_ALU64 | BPF_ADD | BPF_K, 3, 0, 0, HEADERS);
	code[n++] = OP(BPF_JMP | BPF_JLE | BPF_X, 3, 2, 2, 0);
	code[n++] = OP(BPF_ALU64 | BPF_MOV | BPF_K, 0, 0, 0, XDP_ABORTED);
	code[n++] = OP(BPF_JMP | BPF_EXIT, 0, 0, 0, 0);
	for (int at = 0; at + 4 <= HEADERS; at += 4) {
		int32_t word;

		memcpy(&word, frame + at, sizeof(word));
		code[n++] = OP(BPF_ST | BPF_MEM | BPF_W, 6, 0, at, word);
	}
	code[n++] = OP(BPF_ST | BPF_MEM | BPF_H, 6, 0, HEADERS - 2, 0); // the checksum
	code[n++] = OP(BPF_JMP | BPF_CALL, 0, 0, 0, BPF_FUNC_get_prandom_u32);
	code[n++] = OP(BPF_ALU64 | BPF_AND | BPF_K, 0, 0, 0, CONNECTIONS - 1);
	code[n++] = OP(BPF_STX | BPF_MEM | BPF_B, 6, 0, SOURCE_PORT_LOW, 0);
	code[n++] = OP(BPF_ALU64 | BPF_MOV | BPF_K, 1, 0, 0, ifindex);
	code[n++] = OP(BPF_ALU64 | BPF_MOV | BPF_K, 2, 0, 0, 0);
	code[n++] = OP(BPF_JMP | BPF_CALL, 0, 0, 0, BPF_FUNC_redirect);
	code[n++] = OP(BPF_JMP | BPF_EXIT, 0, 0, 0, 0);
	return load(code, n);
}

/* Drops all that comes to the device, until this process ends. */
static void drop_all(int ifindex)
{
	struct bpf_insn code[] = {
		OP(BPF_ALU64 | BPF_MOV | BPF_K, 0, 0, 0, XDP_DROP),
		OP(BPF_JMP | BPF_EXIT, 0, 0, 0, 0),
	};
	union bpf_attr attr = {
		.link_create = {
			.prog_fd = (uint32_t)load(code, sizeof(code) / sizeof(code[0])),
			.target_ifindex = (uint32_t)ifindex,
			.attach_type = BPF_XDP,
		},
	};

	if (bpf(BPF_LINK_CREATE, &attr) < 0)
		die("BPF_LINK_CREATE");
}

static uint64_t received(const char *device)
{
	unsigned long long count;
	char path[128];
	FILE *file;

	snprintf(path, sizeof(path), "/sys/class/net/%s/statistics/rx_packets", device);
	file = fopen(path, "r");
	if (!file)
		die(path);
	if (fscanf(file, "%llu", &count) != 1)
		die(path);
	fclose(file);
	return count;
}

static size_t parse(const char *hex)
{
	size_t length = strlen(hex) / 2;

	if (length < HEADERS || length > MAX_FRAME || strlen(hex) % 2)
		return 0;
	for (size_t i = 0; i < length; i++) {
		unsigned int octet;

		if (sscanf(hex + 2 * i, "%2x", &octet) != 1)
			return 0;
		frame[i] = (unsigned char)octet;
	}
	return length;
}

int main(int argc, char **argv)
{
	uint64_t before, duration, spent = 0, sent = 0;
	union bpf_attr run = { 0 };
	size_t length;
	cpu_set_t set;
	int ifindex;

	if (argc != 6 || (strcmp(argv[4], "drop") && strcmp(argv[4], "stack")) || !(length = parse(argv[5]))) {
		fprintf(stderr, "usage: framegen DEVICE MILLISECONDS CPU drop|stack FRAME\n");
		return 2;
	}
	ifindex = (int)if_nametoindex(argv[1]);
	if (!ifindex)
		die(argv[1]);
	CPU_ZERO(&set);
	CPU_SET(atoi(argv[3]), &set);
	if (sched_setaffinity(0, sizeof(set), &set))
		die("sched_setaffinity");
	if (!strcmp(argv[4], "drop"))
		drop_all(ifindex);
	run.test.prog_fd = (uint32_t)generator(ifindex);
	run.test.data_in = (uintptr_t)frame;
	run.test.data_size_in = (uint32_t)length;
	run.test.repeat = FRAMES_A_CALL;
	run.test.flags = BPF_F_TEST_XDP_LIVE_FRAMES;
	duration = strtoull(argv[2], NULL, 10) * 1000000u;
	before = received(argv[1]);
	while (spent < duration) {
		if (bpf(BPF_PROG_TEST_RUN, &run))
			die("BPF_PROG_TEST_RUN");
		sent += FRAMES_A_CALL;
		spent += (uint64_t)run.test.duration * FRAMES_A_CALL;
	}
	printf("{\"per_s\": %.0f, \"sent\": %llu, \"received\": %llu}\n",
	       (double)(received(argv[1]) - before) * 1e9 / (double)spent, (unsigned long long)sent,
	       (unsigned long long)(received(argv[1]) - before));
	return 0;
}
