/* What a struct looks like in C, for Python to compare with its own picture of it (native_code.check_layout): a line for
   each field, and one for the whole. A struct that Python fills has a LAYOUT beside it. */

#ifndef LAYOUT
#include <stddef.h>
#include <stdint.h>

typedef struct {
    const char *name; /* NULL: the end, with the size of the whole struct */
    int64_t offset, size;
} Field;

#define FIELD(type, name) {#name, offsetof(type, name), sizeof(((type *)0)->name)}
#define LAYOUT(type, ...) const Field layout_of_##type[] = {__VA_ARGS__, {NULL, 0, sizeof(type)}}
#endif
