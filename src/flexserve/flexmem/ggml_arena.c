/* The one thing Python cannot do: a ggml buffer type whose tensors lie where the sealed image puts them.
 *
 * llama.cpp loads a model once, from a skeleton: the real GGUF header and nothing behind it. Every weight
 * gets an address in our arena and no data; the data arrive later, page by page, through userfaultfd.
 *
 * ggml's buffer interface is not installed as a header, so the structures below are declared here, for
 * ggml 0.25.3 (llama-cpp-python 0.3.36). flexserve.flexmem.ggml checks them against the loaded library at
 * start-up and refuses to go on when they differ. Nothing here links to ggml: its functions come in as
 * pointers.
 */
#define _GNU_SOURCE
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <unistd.h>

struct tensor; /* ggml_tensor: opaque, but for the one field at `data_at` */
struct buffer;
struct buffer_type;

struct buffer_type_i {
    const char *(*get_name)(struct buffer_type *);
    struct buffer *(*alloc_buffer)(struct buffer_type *, size_t);
    size_t (*get_alignment)(struct buffer_type *);
    size_t (*get_max_size)(struct buffer_type *);
    size_t (*get_alloc_size)(struct buffer_type *, const struct tensor *);
    bool (*is_host)(struct buffer_type *);
};

struct buffer_type {
    struct buffer_type_i iface;
    void *device;
    void *context;
};

struct buffer_i {
    void (*free_buffer)(struct buffer *);
    void *(*get_base)(struct buffer *);
    int (*init_tensor)(struct buffer *, struct tensor *);
    void (*memset_tensor)(struct buffer *, struct tensor *, uint8_t, size_t, size_t);
    void (*set_tensor)(struct buffer *, struct tensor *, const void *, size_t, size_t);
    void (*get_tensor)(struct buffer *, const struct tensor *, void *, size_t, size_t);
    void (*set_tensor_2d)(struct buffer *, struct tensor *, const void *, size_t, size_t, size_t, size_t, size_t);
    void (*get_tensor_2d)(struct buffer *, const struct tensor *, void *, size_t, size_t, size_t, size_t, size_t);
    bool (*cpy_tensor)(struct buffer *, const struct tensor *, struct tensor *);
    void (*clear)(struct buffer *, uint8_t);
    void (*reset)(struct buffer *);
};

struct ggml_api {
    struct buffer *(*buffer_init)(struct buffer_type *, struct buffer_i, void *, size_t);
    const char *(*tensor_name)(const struct tensor *);
    size_t (*tensor_nbytes)(const struct tensor *);
    size_t data_at; /* offset of ggml_tensor.data, found and checked by the caller */
};

struct place {
    char name[64];
    uint32_t repacked; /* 1: in the layout of ggml's repacked kernels */
    uint32_t seen;
    uint64_t offset, nbytes;
};

/* One per model. The type's name must differ from every other's: ggml keeps them in a map by name. */
struct arena_type {
    struct buffer_type type; /* first: a buffer_type * is an arena_type * */
    char name[64];
    struct ggml_api api;
    uint8_t *base;
    bool loading;
    size_t count, buffers;
    struct place *places; /* sorted by name */
};

/* ggml_backend_buffer, of which we only need what is behind the interface. */
struct buffer {
    struct buffer_i iface;
    struct buffer_type *type;
    void *context;
};

static struct arena_type *of(struct buffer *b) { return b->context; }

static int by_name(const void *a, const void *b) {
    const struct place *p = a, *q = b;
    int order = strncmp(p->name, q->name, 64);
    return order ? order : (int)p->repacked - (int)q->repacked;
}

static const char *get_name(struct buffer_type *t) { return ((struct arena_type *)t)->name; }
static size_t get_alignment(struct buffer_type *t) { (void)t; return 64; }
/* Not host memory while loading, so that the loader hands data to set_tensor (which drops it) instead of
 * writing them itself; host memory afterwards, so that the CPU backend computes in place. */
static bool is_host(struct buffer_type *t) { return !((struct arena_type *)t)->loading; }

static void free_buffer(struct buffer *b) { of(b)->buffers--; }
static void *get_base(struct buffer *b) { return of(b)->base; }

static int place_tensor(struct arena_type *a, struct tensor *t, uint32_t repacked) {
    struct place key = {.repacked = repacked};
    strncpy(key.name, a->api.tensor_name(t), sizeof key.name - 1);
    struct place *p = bsearch(&key, a->places, a->count, sizeof *p, by_name);
    if (p == NULL || p->nbytes != a->api.tensor_nbytes(t))
        return -1; /* GGML_STATUS_FAILED: the load fails, llama.cpp says which buffer */
    p->seen++;
    *(void **)((uint8_t *)t + a->api.data_at) = a->base + p->offset;
    return 0;
}

static int init_tensor(struct buffer *b, struct tensor *t) { return place_tensor(of(b), t, 0); }

static void drop_set(struct buffer *b, struct tensor *t, const void *d, size_t o, size_t n) {
    (void)b, (void)t, (void)d, (void)o, (void)n;
}
static void drop_memset(struct buffer *b, struct tensor *t, uint8_t v, size_t o, size_t n) {
    (void)b, (void)t, (void)v, (void)o, (void)n;
}
static void drop_clear(struct buffer *b, uint8_t v) { (void)b, (void)v; }
static void get_tensor(struct buffer *b, const struct tensor *t, void *out, size_t offset, size_t n) {
    memcpy(out, *(uint8_t *const *)((const uint8_t *)t + of(b)->api.data_at) + offset, n);
}

static struct buffer *buffer_of_type(
    struct arena_type *a, struct buffer_type *t, int (*init)(struct buffer *, struct tensor *), size_t size) {
    struct buffer_i iface = {
        .free_buffer = free_buffer, .get_base = get_base, .init_tensor = init,
        .memset_tensor = drop_memset, .set_tensor = drop_set, .get_tensor = get_tensor, .clear = drop_clear,
    };
    a->buffers++;
    return a->api.buffer_init(t, iface, a, size);
}

static struct buffer *alloc_memory(struct buffer_type *t, size_t size);

/* The model's weights have their places. What llama.cpp allocates beside them afterwards (an adapter takes the type of
 * the weight it changes) has ordinary memory. */
static struct buffer *alloc_buffer(struct buffer_type *t, size_t size) {
    struct arena_type *a = (struct arena_type *)t;
    return a->loading ? buffer_of_type(a, t, init_tensor, size) : alloc_memory(t, size);
}

/* Execution layout. Here llama.cpp must see its own two buffer types, CPU and CPU_REPACK: it chooses between them
 * for every use of every tensor, and only buffers of the second one run the repacked kernels. So while such a model
 * loads, and only then, the two types hand out our memory instead of their own. One model at a time. */
static struct {
    struct arena_type *to; /* NULL: not redirected */
    struct buffer_type *plain, *repack;
    struct buffer_type_i plain_was, repack_was;
} redirected;
static int (*repack_init)(struct buffer *, struct tensor *); /* sets tensor->extra to the kernels */

static int init_repacked(struct buffer *b, struct tensor *t) {
    int status = place_tensor(of(b), t, 1);
    return status ? status : repack_init(b, t);
}

static struct buffer *alloc_plain(struct buffer_type *t, size_t size) {
    return buffer_of_type(redirected.to, t, init_tensor, size);
}
static struct buffer *alloc_repacked(struct buffer_type *t, size_t size) {
    return buffer_of_type(redirected.to, t, init_repacked, size);
}
static bool never_host(struct buffer_type *t) { (void)t; return false; }

/* `donor`: a real buffer of type CPU_REPACK, whose init_tensor we borrow. -1 when another model is loading. */
int flex_redirect(struct arena_type *a, struct buffer_type *plain, const struct buffer *donor) {
    if (redirected.to != NULL)
        return -1;
    struct buffer_type *repack = donor->type;
    repack_init = donor->iface.init_tensor;
    redirected.to = a;
    redirected.plain = plain;
    redirected.repack = repack;
    redirected.plain_was = plain->iface;
    redirected.repack_was = repack->iface;
    plain->iface.alloc_buffer = alloc_plain;
    plain->iface.is_host = never_host;
    repack->iface.alloc_buffer = alloc_repacked;
    return 0;
}

void flex_redirect_end(void) {
    if (redirected.to == NULL)
        return;
    redirected.plain->iface = redirected.plain_was;
    redirected.repack->iface = redirected.repack_was;
    redirected.to = NULL;
}

/* What a context remembers of its tokens, and adapters. While one is made, and only then, the CPU buffer type hands out
 * this memory instead of its own: when it is cleared, it is zeroed and its pages go back to the kernel, so that only tokens
 * that are there take memory. */
#define MADV_DONTNEED_LOCKED_ 24 /* Linux 5.18; plain DONTNEED refuses locked pages */

struct memory {
    uint8_t *base;
    size_t size; /* whole pages */
};

static struct {
    struct buffer_type *plain; /* NULL: not now */
    struct buffer_type_i was;
    struct ggml_api api;
} remembering;

/* Zero what is in memory, without taking any for it, and give it back. */
static void give_back(const struct memory *m) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), most = 1024;
    unsigned char there[1024];
    for (size_t at = 0; at < m->size; at += most * page) {
        size_t n = m->size - at < most * page ? m->size - at : most * page;
        if (mincore(m->base + at, n, there) != 0)
            memset(there, 1, sizeof there);
        for (size_t i = 0; i < n / page; i++)
            if (there[i] & 1)
                memset(m->base + at + i * page, 0, page);
    }
    if (madvise(m->base, m->size, MADV_DONTNEED_LOCKED_) != 0)
        madvise(m->base, m->size, MADV_DONTNEED); /* where that fails too, zeros stay */
}

static void *memory_base(struct buffer *b) { return ((struct memory *)b->context)->base; }
static void memory_free(struct buffer *b) {
    struct memory *m = b->context;
    give_back(m);
    munmap(m->base, m->size);
    free(m);
}
static void memory_clear(struct buffer *b, uint8_t value) {
    struct memory *m = b->context;
    if (value == 0)
        give_back(m);
    else
        memset(m->base, value, m->size);
}
static uint8_t *data_of(const struct tensor *t) {
    return *(uint8_t *const *)((const uint8_t *)t + remembering.api.data_at);
}
static void memory_memset(struct buffer *b, struct tensor *t, uint8_t v, size_t o, size_t n) {
    (void)b;
    memset(data_of(t) + o, v, n);
}
static void memory_set(struct buffer *b, struct tensor *t, const void *d, size_t o, size_t n) {
    (void)b;
    memcpy(data_of(t) + o, d, n);
}
static void memory_get(struct buffer *b, const struct tensor *t, void *d, size_t o, size_t n) {
    (void)b;
    memcpy(d, data_of(t) + o, n);
}

static struct buffer *alloc_memory(struct buffer_type *t, size_t size) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    struct memory *m = malloc(sizeof *m);
    if (m == NULL)
        return NULL;
    m->size = size ? (size + page - 1) / page * page : page;
    m->base = mmap(NULL, m->size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (m->base == MAP_FAILED) {
        free(m);
        return NULL;
    }
    madvise(m->base, m->size, MADV_DONTDUMP);
    madvise(m->base, m->size, MADV_DONTFORK);
    struct buffer_i iface = {
        .free_buffer = memory_free, .get_base = memory_base, .memset_tensor = memory_memset,
        .set_tensor = memory_set, .get_tensor = memory_get, .clear = memory_clear,
    };
    return remembering.api.buffer_init(t, iface, m, size);
}

/* -1 when another context is being made. */
int flex_remember(struct buffer_type *plain, const struct ggml_api *api) {
    if (remembering.plain != NULL)
        return -1;
    remembering.plain = plain;
    remembering.was = plain->iface;
    remembering.api = *api; /* stays: the buffers use it */
    plain->iface.alloc_buffer = alloc_memory;
    return 0;
}

void flex_remember_end(void) {
    if (remembering.plain == NULL)
        return;
    remembering.plain->iface = remembering.was;
    remembering.plain = NULL;
}

struct arena_type *flex_type_new(const char *name, void *base, const struct ggml_api *api, size_t count) {
    struct arena_type *a = calloc(1, sizeof *a);
    if (a == NULL)
        return NULL;
    a->places = calloc(count ? count : 1, sizeof *a->places);
    if (a->places == NULL) {
        free(a);
        return NULL;
    }
    a->type.iface = (struct buffer_type_i){.get_name = get_name, .alloc_buffer = alloc_buffer,
                                           .get_alignment = get_alignment, .is_host = is_host};
    strncpy(a->name, name, sizeof a->name - 1);
    a->api = remembering.api = *api;
    a->base = base;
    a->loading = true;
    return a;
}

void flex_type_place(struct arena_type *a, const char *tensor, uint32_t repacked, uint64_t offset, uint64_t nbytes) {
    struct place *p = &a->places[a->count++];
    *p = (struct place){.repacked = repacked, .offset = offset, .nbytes = nbytes};
    strncpy(p->name, tensor, sizeof p->name - 1);
}

void flex_type_sort(struct arena_type *a) { qsort(a->places, a->count, sizeof *a->places, by_name); }

void flex_type_loaded(struct arena_type *a) { a->loading = false; }

/* How many tensors of the table llama.cpp has given a place to. */
size_t flex_type_seen(const struct arena_type *a) {
    size_t n = 0;
    for (size_t i = 0; i < a->count; i++)
        n += a->places[i].seen > 0;
    return n;
}

/* Whether llama.cpp has given this tensor its place. */
int flex_type_has_seen(const struct arena_type *a, const char *tensor, uint32_t repacked) {
    struct place key = {.repacked = repacked};
    strncpy(key.name, tensor, sizeof key.name - 1);
    struct place *p = bsearch(&key, a->places, a->count, sizeof *p, by_name);
    return p != NULL && p->seen > 0;
}

/* 0, or -1 while ggml still holds buffers of this type. */
int flex_type_free(struct arena_type *a) {
    if (a->buffers != 0)
        return -1;
    free(a->places);
    free(a);
    return 0;
}

/* The skeleton: a FILE with the header's bytes, of the GGUF's full size. Reads behind the header leave the
 * caller's buffer as it is: nobody looks at it, since set_tensor drops it. */
struct skeleton {
    const uint8_t *header;
    off64_t header_size, size, at;
};

static ssize_t skeleton_read(void *cookie, char *out, size_t n) {
    struct skeleton *s = cookie;
    if (s->at >= s->size)
        return 0;
    if ((off64_t)n > s->size - s->at)
        n = (size_t)(s->size - s->at);
    if (s->at < s->header_size) {
        size_t real = (off64_t)n < s->header_size - s->at ? n : (size_t)(s->header_size - s->at);
        memcpy(out, s->header + s->at, real);
    }
    s->at += (off64_t)n;
    return (ssize_t)n;
}

static int skeleton_seek(void *cookie, off64_t *offset, int whence) {
    struct skeleton *s = cookie;
    off64_t at = *offset + (whence == SEEK_CUR ? s->at : whence == SEEK_END ? s->size : 0);
    if (at < 0)
        return -1;
    *offset = s->at = at;
    return 0;
}

static int skeleton_close(void *cookie) {
    free(cookie);
    return 0;
}

/* `header` must live until fclose. */
FILE *flex_skeleton_open(const void *header, uint64_t header_size, uint64_t size) {
    struct skeleton *s = malloc(sizeof *s);
    if (s == NULL)
        return NULL;
    *s = (struct skeleton){header, (off64_t)header_size, (off64_t)size, 0};
    FILE *f = fopencookie(s, "rb",
        (cookie_io_functions_t){.read = skeleton_read, .seek = skeleton_seek, .close = skeleton_close});
    if (f == NULL)
        free(s);
    return f;
}

int flex_skeleton_close(FILE *f) { return fclose(f); }

/* llama.cpp's abort callback: asked at every node of a graph, which Python would be far too slow for. */
bool flex_flag_is_set(void *flag) { return *(volatile int *)flag != 0; }
