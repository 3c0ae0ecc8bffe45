/* As much of msgpack as cprd and its bundles take. Reading never trusts a length, and no depth of
 * what is read is a depth of calls. Not for programs. */
#ifndef CPRD_MSGPACK_H
#define CPRD_MSGPACK_H

#include "cprd_internal.h"

#include <string.h>


static inline void put_number(bytes *b, uint8_t type, uint64_t value, int width) { /* big endian */
    unsigned char data[9] = {type};
    for (int n = 0; n < width; n++) data[1 + n] = (unsigned char)(value >> 8 * (width - 1 - n));
    put(b, data, 1 + (size_t)width);
}
static inline void put_text(bytes *b, const char *text) {
    put_number(b, 0xdb, strlen(text), 4);
    put(b, text, strlen(text));
}
static inline void put_binary(bytes *b, const void *data, size_t size) {
    put_number(b, 0xc6, size, 4);
    put(b, data, size);
}

/* A request's fields: each key counts. */
static inline void field(bytes *b, int *count, const char *key) { ++*count, put_text(b, key); }
static inline void field_uint(bytes *b, int *n, const char *key, uint64_t value) {
    field(b, n, key), put_number(b, 0xcf, value, 8);
}
static inline void field_bool(bytes *b, int *n, const char *key, int value) {
    field(b, n, key), put(b, value ? "\xc3" : "\xc2", 1);
}
static inline void field_text(bytes *b, int *n, const char *key, const char *value) {
    field(b, n, key), put_text(b, value);
}
static inline void field_double(bytes *b, int *n, const char *key, double value) {
    uint64_t raw;
    memcpy(&raw, &value, 8);
    field(b, n, key), put_number(b, 0xcb, raw, 8);
}

struct reader {
    const unsigned char *at, *end;
    int bad;
};
enum kind { NIL, BOOL, UINT, INT, DOUBLE, TEXT, BINARY, ARRAY, MAP };
struct value {
    enum kind kind;
    uint64_t number; /* of a bool, an integer, or an item count; bits of a double */
    const unsigned char *data;
    size_t size; /* of text and binary */
};

static inline uint64_t big_endian(struct reader *r, int width) {
    uint64_t value = 0;
    if (r->end - r->at < width) return r->bad = 1, 0;
    for (int n = 0; n < width; n++) value = value << 8 | *r->at++;
    return value;
}

/* The head of the next value; text and binary with their bytes. */
static inline struct value next(struct reader *r) {
    struct value v = {.kind = NIL};
    unsigned type = (unsigned)big_endian(r, 1);
    if (r->bad) return v;
    if (type < 0x80) v.kind = UINT, v.number = type;
    else if (type < 0x90) v.kind = MAP, v.number = type & 15;
    else if (type < 0xa0) v.kind = ARRAY, v.number = type & 15;
    else if (type < 0xc0) v.kind = TEXT, v.size = type & 31;
    else if (type >= 0xe0) v.kind = INT, v.number = (uint64_t)(int64_t)(int8_t)type;
    else switch (type) {
        case 0xc0: break;
        case 0xc2: case 0xc3: v.kind = BOOL, v.number = type & 1; break;
        case 0xc4: case 0xc5: case 0xc6:
            v.kind = BINARY, v.size = big_endian(r, 1 << (type - 0xc4)); break;
        case 0xca: { /* float 32 */
            uint32_t raw = (uint32_t)big_endian(r, 4);
            float narrow;
            double wide;
            memcpy(&narrow, &raw, 4);
            wide = narrow;
            v.kind = DOUBLE, memcpy(&v.number, &wide, 8);
            break;
        }
        case 0xcb: v.kind = DOUBLE, v.number = big_endian(r, 8); break;
        case 0xcc: case 0xcd: case 0xce: case 0xcf:
            v.kind = UINT, v.number = big_endian(r, 1 << (type - 0xcc)); break;
        case 0xd0: v.kind = INT, v.number = (uint64_t)(int64_t)(int8_t)big_endian(r, 1); break;
        case 0xd1: v.kind = INT, v.number = (uint64_t)(int64_t)(int16_t)big_endian(r, 2); break;
        case 0xd2: v.kind = INT, v.number = (uint64_t)(int64_t)(int32_t)big_endian(r, 4); break;
        case 0xd3: v.kind = INT, v.number = big_endian(r, 8); break;
        case 0xd9: case 0xda: case 0xdb:
            v.kind = TEXT, v.size = big_endian(r, 1 << (type - 0xd9)); break;
        case 0xdc: case 0xdd: v.kind = ARRAY, v.number = big_endian(r, type == 0xdc ? 2 : 4); break;
        case 0xde: case 0xdf: v.kind = MAP, v.number = big_endian(r, type == 0xde ? 2 : 4); break;
        default: r->bad = 1; /* an extension type */
        }
    if (v.kind == INT && (int64_t)v.number >= 0) v.kind = UINT;
    if (v.kind == TEXT || v.kind == BINARY) {
        if ((size_t)(r->end - r->at) < v.size) return r->bad = 1, (struct value){.kind = NIL};
        v.data = r->at;
        r->at += v.size;
    }
    return v;
}

/* Pass over the next value, whatever its depth. */
static inline void skip(struct reader *r) {
    for (uint64_t left = 1; left && !r->bad; left--) {
        struct value v = next(r);
        if (v.kind == ARRAY) left += v.number;
        if (v.kind == MAP) left += 2 * v.number;
    }
}

static inline int is(const struct value *v, const char *text) {
    return v->kind == TEXT && v->size == strlen(text) && !memcmp(v->data, text, v->size);
}
static inline double seconds_of(const struct value *v) {
    double value;
    memcpy(&value, &v->number, 8);
    return v->kind == DOUBLE ? value : v->kind == UINT ? (double)v->number : -1;
}
static inline void copy_text(char *to, size_t room, const struct value *v) {
    size_t size = v->kind == TEXT ? (v->size < room - 1 ? v->size : room - 1) : 0;
    if (size) memcpy(to, v->data, size);
    to[size] = 0;
}

#endif
