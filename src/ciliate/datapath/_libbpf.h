/* SPDX-License-Identifier: Apache-2.0 */
/* What the extension adds to libbpf: loops that must not cost a Python call a row, captured logs, and calls whose option
 * structs are easier to fill in C. Included verbatim in the extension by _libbpf_build.py. All functions return a
 * negative errno on failure.
 */
#include <errno.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <linux/bpf.h>
#include <linux/membarrier.h>
#include <bpf/bpf.h>
#include <bpf/btf.h>
#include <bpf/libbpf.h>

/* ---- log -------------------------------------------------------------------------------------------------- */

static __thread char *log_buf;
static __thread size_t log_len, log_cap;

static int log_print(enum libbpf_print_level level, const char *format, va_list args)
{
	va_list copy;
	int need;

	if (level == LIBBPF_DEBUG)
		return 0;
	va_copy(copy, args);
	need = vsnprintf(NULL, 0, format, copy);
	va_end(copy);
	if (need < 0)
		return need;
	if (log_len + (size_t)need + 1 > log_cap) {
		size_t cap = (log_len + (size_t)need + 1) * 2;
		char *grown = realloc(log_buf, cap);

		if (!grown)
			return -ENOMEM;
		log_buf = grown;
		log_cap = cap;
	}
	vsnprintf(log_buf + log_len, log_cap - log_len, format, args);
	log_len += (size_t)need;
	return need;
}

/* Messages of libbpf on this thread go to a buffer from now on; what was there is forgotten. */
static void cil_log_start(void)
{
	libbpf_set_print(log_print);
	free(log_buf);
	log_buf = NULL;
	log_len = log_cap = 0;
}

static const char *cil_log(size_t *length)
{
	*length = log_len;
	return log_buf;
}

/* ---- object ----------------------------------------------------------------------------------------------- */

static int cil_object_open(const char *path, const char *pin_root, struct bpf_object **out)
{
	LIBBPF_OPTS(bpf_object_open_opts, opts, .pin_root_path = pin_root);
	struct bpf_object *object = bpf_object__open_file(path, &opts);
	long error = libbpf_get_error(object);

	if (error)
		return (int)error;
	*out = object;
	return 0;
}

static int cil_test_run(int prog, const void *data, uint32_t size, void *out, uint32_t *out_size,
			const struct __sk_buff *ctx, struct __sk_buff *ctx_out, int repeat, uint32_t *retval,
			uint32_t *duration)
{
	LIBBPF_OPTS(bpf_test_run_opts, opts, .data_in = data, .data_size_in = size, .data_out = out,
		    .data_size_out = *out_size, .ctx_in = ctx, .ctx_size_in = ctx ? sizeof(*ctx) : 0,
		    .ctx_out = ctx_out, .ctx_size_out = ctx_out ? sizeof(*ctx_out) : 0, .repeat = repeat);
	int error = bpf_prog_test_run_opts(prog, &opts);

	*out_size = opts.data_size_out;
	*retval = opts.retval;
	*duration = opts.duration;
	return error;
}

/* Copies the raw BTF object `id` to a buffer of `size` octets; returns its length, which may be more. */
static int cil_btf_raw(uint32_t id, void *buffer, uint32_t size)
{
	struct btf *btf = btf__load_from_kernel_by_id(id);
	long error = libbpf_get_error(btf);
	const void *raw;
	uint32_t length = 0;

	if (error)
		return (int)error;
	raw = btf__raw_data(btf, &length);
	if (raw && length <= size)
		memcpy(buffer, raw, length);
	btf__free(btf);
	return raw ? (int)length : -ENOMEM;
}

struct cil_map_info {
	uint32_t type, id, key_size, value_size, max_entries, map_flags;
	uint32_t btf_id, btf_key_type_id, btf_value_type_id;
	char name[16];
};

static int cil_map_info(int fd, struct cil_map_info *out)
{
	struct bpf_map_info info = {};
	uint32_t size = sizeof(info);
	int error = bpf_obj_get_info_by_fd(fd, &info, &size);

	if (error)
		return error;
	*out = (struct cil_map_info){
		.type = info.type, .id = info.id, .key_size = info.key_size, .value_size = info.value_size,
		.max_entries = info.max_entries, .map_flags = info.map_flags, .btf_id = info.btf_id,
		.btf_key_type_id = info.btf_key_type_id, .btf_value_type_id = info.btf_value_type_id,
	};
	memcpy(out->name, info.name, sizeof(out->name));
	return 0;
}

/* Returns the id of the program, which is a positive number. */
static int cil_prog_id(int fd, uint32_t *id)
{
	struct bpf_prog_info info = {};
	uint32_t size = sizeof(info);
	int error = bpf_obj_get_info_by_fd(fd, &info, &size);

	*id = info.id;
	return error;
}

/* ---- maps ------------------------------------------------------------------------------------------------- */

/* Writes `count` rows; *done says how many are in. `batch`: 1 try the batch call, 0 do not. */
static int cil_map_update(int fd, const char *keys, uint32_t key_size, const char *values, uint32_t value_size,
			  uint32_t count, uint64_t flags, int batch, uint32_t *done)
{
	uint32_t i;
	int error;

	*done = 0;
	if (batch && count > 1) {
		LIBBPF_OPTS(bpf_map_batch_opts, opts, .elem_flags = flags);
		uint32_t wrote = count;

		error = bpf_map_update_batch(fd, keys, values, &wrote, &opts);
		if (!error) {
			*done = count;
			return 0;
		}
		/* The kernel reports the rows written before the error, unless it knows no batches at all. */
		if (error != -ENOTSUP && error != -EINVAL && error != -524) {
			*done = wrote <= count ? wrote : 0;
			return error;
		}
	}
	for (i = 0; i < count; i++) {
		error = bpf_map_update_elem(fd, keys + (size_t)i * key_size, values + (size_t)i * value_size, flags);
		if (error)
			return error;
		*done = i + 1;
	}
	return 0;
}

/* Deletes rows one by one; rows that are not there are no error. Returns how many were there. */
static int cil_map_delete(int fd, const char *keys, uint32_t key_size, uint32_t count)
{
	uint32_t i, gone = 0;
	int error;

	for (i = 0; i < count; i++) {
		error = bpf_map_delete_elem(fd, keys + (size_t)i * key_size);
		if (!error)
			gone++;
		else if (error != -ENOENT)
			return error;
	}
	return (int)gone;
}

/* Looks up `count` rows; found[i] says whether values[i] is set. */
static int cil_map_lookup(int fd, const char *keys, uint32_t key_size, char *values, uint32_t value_size,
			  uint32_t count, char *found)
{
	uint32_t i;
	int error;

	for (i = 0; i < count; i++) {
		error = bpf_map_lookup_elem(fd, keys + (size_t)i * key_size, values + (size_t)i * value_size);
		found[i] = !error;
		if (error && error != -ENOENT)
			return error;
	}
	return 0;
}

/* Walks keys with get_next_key from `cursor` (have_cursor: its key is valid) and fills up to `count` rows. Returns how
 * many; `ended` says that there are no more. Rows that vanish meanwhile are skipped.
 */
static int cil_map_walk(int fd, char *cursor, int have_cursor, char *keys, uint32_t key_size, char *values,
			uint32_t value_size, uint32_t count, int *ended)
{
	char next[512];
	uint32_t i = 0;
	int error;

	*ended = 0;
	if (key_size > sizeof(next))
		return -E2BIG;
	while (i < count) {
		error = bpf_map_get_next_key(fd, have_cursor ? cursor : NULL, next);
		if (error == -ENOENT) {
			*ended = 1;
			break;
		}
		if (error)
			return error;
		memcpy(cursor, next, key_size);
		have_cursor = 1;
		error = bpf_map_lookup_elem(fd, next, values + (size_t)i * value_size);
		if (error == -ENOENT)
			continue;
		if (error)
			return error;
		memcpy(keys + (size_t)i * key_size, next, key_size);
		i++;
	}
	return (int)i;
}

/* One step of a batched dump: *count rows wanted, then got. 0: more may follow; -ENOENT: these were the last. */
static int cil_map_lookup_batch(int fd, char *cursor, int have_cursor, char *keys, char *values, uint32_t *count)
{
	char next[512] = {};
	int error = bpf_map_lookup_batch(fd, have_cursor ? cursor : NULL, next, keys, values, count, NULL);

	memcpy(cursor, next, sizeof(next));
	return error;
}

/* Counts keys; a map that changes meanwhile gives an estimate, bounded by `limit`. */
static int cil_map_count(int fd, uint32_t key_size, uint32_t limit)
{
	char key[512], next[512];
	uint32_t n = 0;
	int error;

	if (key_size > sizeof(key))
		return -E2BIG;
	error = bpf_map_get_next_key(fd, NULL, next);
	while (!error && n < limit) {
		n++;
		memcpy(key, next, key_size);
		error = bpf_map_get_next_key(fd, key, next);
	}
	return error && error != -ENOENT ? error : (int)n;
}

/* ---- links ------------------------------------------------------------------------------------------------ */

struct cil_link_info {
	uint32_t type, id, prog_id, ifindex, attach_type;
};

/* The part of struct bpf_link_info that TCX and netkit links have (kernel UAPI since 6.6); of XDP links (since 5.9) the ifindex. */
struct cil_kernel_link_info {
	uint32_t type, id, prog_id, pad;
	uint32_t ifindex, attach_type;
	uint8_t rest[64];
};

static int cil_link_info(int fd, struct cil_link_info *out)
{
	struct cil_kernel_link_info info = {};
	uint32_t size = sizeof(info);
	int error = bpf_obj_get_info_by_fd(fd, &info, &size);

	*out = (struct cil_link_info){ info.type, info.id, info.prog_id, info.ifindex, info.attach_type };
	return error;
}

static int cil_link_create(int prog, int ifindex, int attach_type)
{
	return bpf_link_create(prog, ifindex, (enum bpf_attach_type)attach_type, NULL);
}

/* `flags`: XDP_FLAGS_DRV_MODE, XDP_FLAGS_SKB_MODE of <linux/if_link.h>. */
static int cil_xdp_create(int prog, int ifindex, uint32_t flags)
{
	LIBBPF_OPTS(bpf_link_create_opts, opts, .flags = flags);

	return bpf_link_create(prog, ifindex, BPF_XDP, &opts);
}

static int cil_link_update(int link, int prog)
{
	return bpf_link_update(link, prog, NULL);
}

/* clsact: ingress if `ingress`, else egress. Replaces what the same handle and priority had, in one step. */
static int cil_tc_attach(int ifindex, int ingress, int prog, uint32_t handle, uint32_t priority)
{
	LIBBPF_OPTS(bpf_tc_hook, hook, .ifindex = ifindex,
		    .attach_point = ingress ? BPF_TC_INGRESS : BPF_TC_EGRESS);
	LIBBPF_OPTS(bpf_tc_opts, opts, .prog_fd = prog, .handle = handle, .priority = priority,
		    .flags = BPF_TC_F_REPLACE);
	int error = bpf_tc_hook_create(&hook);

	if (error && error != -EEXIST)
		return error;
	return bpf_tc_attach(&hook, &opts);
}

static int cil_tc_detach(int ifindex, int ingress, uint32_t handle, uint32_t priority)
{
	LIBBPF_OPTS(bpf_tc_hook, hook, .ifindex = ifindex,
		    .attach_point = ingress ? BPF_TC_INGRESS : BPF_TC_EGRESS);
	LIBBPF_OPTS(bpf_tc_opts, opts, .handle = handle, .priority = priority);

	return bpf_tc_detach(&hook, &opts);
}

static int cil_tc_query(int ifindex, int ingress, uint32_t handle, uint32_t priority, uint32_t *prog_id)
{
	LIBBPF_OPTS(bpf_tc_hook, hook, .ifindex = ifindex,
		    .attach_point = ingress ? BPF_TC_INGRESS : BPF_TC_EGRESS);
	LIBBPF_OPTS(bpf_tc_opts, opts, .handle = handle, .priority = priority);
	int error = bpf_tc_query(&hook, &opts);

	*prog_id = opts.prog_id;
	return error;
}

/* ---- ring buffer ------------------------------------------------------------------------------------------ */

struct cil_ring {
	uint64_t *consumer;       /* page, read-write */
	const uint64_t *producer; /* page, read-only, and after it the data, mapped twice */
	const uint8_t *data;
	uint64_t mask;
	size_t page;
};

static int cil_ring_map(int fd, uint32_t size, struct cil_ring *ring)
{
	size_t page = (size_t)sysconf(_SC_PAGESIZE);
	void *rw = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	void *ro;

	if (rw == MAP_FAILED)
		return -errno;
	ro = mmap(NULL, page + 2 * (size_t)size, PROT_READ, MAP_SHARED, fd, (off_t)page);
	if (ro == MAP_FAILED) {
		int error = -errno;

		munmap(rw, page);
		return error;
	}
	*ring = (struct cil_ring){ rw, ro, (const uint8_t *)ro + page, size - 1, page };
	return 0;
}

static void cil_ring_unmap(struct cil_ring *ring)
{
	munmap(ring->consumer, ring->page);
	munmap((void *)ring->producer, ring->page + 2 * (ring->mask + 1));
	memset(ring, 0, sizeof(*ring));
}

/* Copies up to `count` committed records of `size` octets to `out` and frees their place. Records that the programs
 * discarded, or that have another size, are skipped; the latter are counted in *odd. Stops at a record still being
 * written. Returns how many were copied.
 */
static int cil_ring_read(struct cil_ring *ring, void *out, uint32_t size, uint32_t count, uint32_t *odd)
{
	uint64_t consumer = __atomic_load_n(ring->consumer, __ATOMIC_RELAXED);
	uint64_t producer = __atomic_load_n(ring->producer, __ATOMIC_ACQUIRE);
	uint64_t freed = consumer;
	uint32_t n = 0;

	while (consumer < producer && n < count) {
		const uint8_t *record = ring->data + (consumer & ring->mask);
		uint32_t header = __atomic_load_n((const uint32_t *)record, __ATOMIC_ACQUIRE);
		uint32_t length = header & ~(BPF_RINGBUF_BUSY_BIT | BPF_RINGBUF_DISCARD_BIT);

		if (header & BPF_RINGBUF_BUSY_BIT)
			break;
		if (!(header & BPF_RINGBUF_DISCARD_BIT)) {
			if (length == size)
				memcpy((uint8_t *)out + (size_t)n++ * size, record + BPF_RINGBUF_HDR_SZ, size);
			else
				(*odd)++;
		}
		consumer += (length + BPF_RINGBUF_HDR_SZ + 7) & ~7u;
		/* Give place back as we go: a writer need not wait for the whole batch. */
		if (consumer - freed > 65536) {
			__atomic_store_n(ring->consumer, consumer, __ATOMIC_RELEASE);
			freed = consumer;
		}
	}
	__atomic_store_n(ring->consumer, consumer, __ATOMIC_RELEASE);
	return (int)n;
}

/* Octets written and not yet read. */
static uint64_t cil_ring_pending(struct cil_ring *ring)
{
	return __atomic_load_n(ring->producer, __ATOMIC_ACQUIRE) - __atomic_load_n(ring->consumer, __ATOMIC_RELAXED);
}

/* ---- namespaces, kernel ------------------------------------------------------------------------------------ */

/* Moves this thread to the network namespace behind `fd`. */
static int cil_setns_net(int fd)
{
	return setns(fd, CLONE_NEWNET) ? -errno : 0;
}

/* Moves this thread to a network namespace of its own. */
static int cil_unshare_net(void)
{
	return unshare(CLONE_NEWNET) ? -errno : 0;
}

/* Returns when every program run that was under way has ended: the kernel waits for an RCU grace period. */
static int cil_grace_period(void)
{
	return syscall(SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) ? -errno : 0;
}

/* Loads a tc program that does nothing; returns its descriptor. For probes. */
static int cil_load_trivial(void)
{
	struct bpf_insn insns[] = {
		{ .code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = BPF_REG_0, .imm = -1 },
		{ .code = BPF_JMP | BPF_EXIT },
	};

	return bpf_prog_load(BPF_PROG_TYPE_SCHED_CLS, "ciliate_probe", "GPL", insns, 2, NULL);
}

/* Whether a tc program may call the helper. */
static int cil_has_tc_helper(int helper)
{
	return libbpf_probe_bpf_helper(BPF_PROG_TYPE_SCHED_CLS, (enum bpf_func_id)helper, NULL);
}

/* A small LPM trie, which needs a flag that bpf_map_create() takes in an option struct. */
static int cil_lpm_create(uint32_t key_size)
{
	LIBBPF_OPTS(bpf_map_create_opts, opts, .map_flags = BPF_F_NO_PREALLOC);

	return bpf_map_create(BPF_MAP_TYPE_LPM_TRIE, "ciliate_probe", key_size, 4, 4, &opts);
}
