"""Builds ``ciliate.datapath._libbpf``, the extension that calls libbpf (cffi, API mode). Run by setup.py."""

from pathlib import Path

from cffi import FFI

_HERE = Path(__file__).parent

ffi = FFI()
ffi.cdef(
    """
struct bpf_object;
struct bpf_map;
struct bpf_program;

struct bpf_map *bpf_object__next_map(const struct bpf_object *obj, const struct bpf_map *map);
struct bpf_program *bpf_object__next_program(const struct bpf_object *obj, struct bpf_program *prog);
int bpf_object__load(struct bpf_object *obj);
void bpf_object__close(struct bpf_object *obj);
const char *bpf_program__name(const struct bpf_program *prog);
int bpf_program__fd(const struct bpf_program *prog);
size_t bpf_program__insn_cnt(const struct bpf_program *prog);
int bpf_program__set_autoload(struct bpf_program *prog, bool autoload);
const char *bpf_map__name(const struct bpf_map *map);
int bpf_map__fd(const struct bpf_map *map);
int bpf_map__type(const struct bpf_map *map);
uint32_t bpf_map__key_size(const struct bpf_map *map);
uint32_t bpf_map__value_size(const struct bpf_map *map);
uint32_t bpf_map__max_entries(const struct bpf_map *map);
uint32_t bpf_map__map_flags(const struct bpf_map *map);
int bpf_map__set_max_entries(struct bpf_map *map, uint32_t max_entries);
const char *bpf_map__pin_path(const struct bpf_map *map);
int bpf_map__set_pin_path(struct bpf_map *map, const char *path);
const void *bpf_map__initial_value(struct bpf_map *map, size_t *psize);
int bpf_map__set_initial_value(struct bpf_map *map, const void *data, size_t size);

int bpf_map_lookup_elem(int fd, const void *key, void *value);
int bpf_map_update_elem(int fd, const void *key, const void *value, uint64_t flags);
int bpf_map_delete_elem(int fd, const void *key);
int bpf_obj_get(const char *path);
int bpf_obj_pin(int fd, const char *path);
int bpf_link_detach(int link_fd);
int bpf_map_get_fd_by_id(uint32_t id);
int libbpf_num_possible_cpus(void);
int libbpf_probe_bpf_map_type(int map_type, const void *opts);
int bpf_map_create(int type, const char *name, uint32_t key_size, uint32_t value_size, uint32_t max_entries,
                   const void *opts);
uint32_t libbpf_major_version(void);
uint32_t libbpf_minor_version(void);

struct __sk_buff {
    uint32_t mark;
    uint32_t priority;
    uint32_t ifindex;
    uint32_t ingress_ifindex;
    uint32_t cb[5];
    uint32_t wire_len;
    uint32_t gso_segs;
    uint32_t gso_size;
    ...;
};

void cil_log_start(void);
const char *cil_log(size_t *length);
int cil_object_open(const char *path, const char *pin_root, struct bpf_object **out);
int cil_test_run(int prog, const void *data, uint32_t size, void *out, uint32_t *out_size,
                 const struct __sk_buff *ctx, struct __sk_buff *ctx_out, int repeat, uint32_t *retval,
                 uint32_t *duration);
int cil_btf_raw(uint32_t id, void *buffer, uint32_t size);
struct cil_map_info {
    uint32_t type, id, key_size, value_size, max_entries, map_flags;
    uint32_t btf_id, btf_key_type_id, btf_value_type_id;
    char name[16];
};
int cil_map_info(int fd, struct cil_map_info *out);
int cil_prog_id(int fd, uint32_t *id);
int cil_map_update(int fd, const char *keys, uint32_t key_size, const char *values, uint32_t value_size,
                   uint32_t count, uint64_t flags, int batch, uint32_t *done);
int cil_map_delete(int fd, const char *keys, uint32_t key_size, uint32_t count);
int cil_map_lookup(int fd, const char *keys, uint32_t key_size, char *values, uint32_t value_size, uint32_t count,
                   char *found);
int cil_map_walk(int fd, char *cursor, int have_cursor, char *keys, uint32_t key_size, char *values,
                 uint32_t value_size, uint32_t count, int *ended);
int cil_map_lookup_batch(int fd, char *cursor, int have_cursor, char *keys, char *values, uint32_t *count);
int cil_map_count(int fd, uint32_t key_size, uint32_t limit);
struct cil_link_info {
    uint32_t type, id, prog_id, ifindex, attach_type;
};
int cil_link_info(int fd, struct cil_link_info *out);
int cil_link_create(int prog, int ifindex, int attach_type);
int cil_xdp_create(int prog, int ifindex, uint32_t flags);
int cil_link_update(int link, int prog);
int cil_tc_attach(int ifindex, int ingress, int prog, uint32_t handle, uint32_t priority);
int cil_tc_detach(int ifindex, int ingress, uint32_t handle, uint32_t priority);
int cil_tc_query(int ifindex, int ingress, uint32_t handle, uint32_t priority, uint32_t *prog_id);
struct cil_ring {
    ...;
};
int cil_ring_map(int fd, uint32_t size, struct cil_ring *ring);
void cil_ring_unmap(struct cil_ring *ring);
int cil_ring_read(struct cil_ring *ring, void *out, uint32_t size, uint32_t count, uint32_t *odd);
uint64_t cil_ring_pending(struct cil_ring *ring);
int cil_setns_net(int fd);
int cil_unshare_net(void);
int cil_grace_period(void);
int cil_load_trivial(void);
int cil_has_tc_helper(int helper);
int cil_lpm_create(uint32_t key_size);
"""
)
ffi.set_source(
    "ciliate.datapath._libbpf",
    (_HERE / "_libbpf.h").read_text(encoding="utf-8"),
    libraries=["bpf"],
    extra_compile_args=["-O2", "-Wall", "-D_GNU_SOURCE"],
)

if __name__ == "__main__":
    ffi.compile(verbose=True)
