/* Packed weights to float32: the numbers of MLX's `mx.dequantize` to the last bit, which is why this must be compiled
   without contraction into fused multiply-adds. Called by quantized.py, without Python's lock. Little-endian. */

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GLIBC__)
/* the better one that the processor has is chosen when the library is loaded (AVX-512 was no faster) */
#define FOR_EVERY_PROCESSOR __attribute__((target_clones("avx2", "default")))
#else
#define FOR_EVERY_PROCESSOR
#endif
#define INLINE static inline __attribute__((always_inline))

enum { FLOAT32, FLOAT16, BFLOAT16 }; /* of scales and biases */
enum { MOST = 512 };                 /* values unpacked at a time, and the largest group */

INLINE float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

INLINE float float_at(const void *floats, const int kind, size_t i) {
  if (kind == FLOAT32) return ((const float *)floats)[i];
  uint32_t half = ((const uint16_t *)floats)[i];
  if (kind == BFLOAT16) return as_float(half << 16);
  uint32_t sign = (half & 0x8000) << 16, rest = (half & 0x7fff) << 13;
  if (rest >= 0x7c00u << 13) return as_float(sign | 0x7f800000 | rest); /* infinite, or no number */
  return as_float(sign | 0x3f800000) * (as_float(rest) * 0x1p112f);     /* also right for subnormal ones */
}

/* `n` values (a multiple of 32) of `bits` bits each, the lowest bits first, to a byte each. */
INLINE void unpack(const uint8_t *packed, uint8_t *values, size_t n, const int bits) {
  if (bits == 4) { /* compilers make vectors of it */
    for (size_t i = 0; i < n / 2; i++) {
      values[2 * i] = packed[i] & 15;
      values[2 * i + 1] = packed[i] >> 4;
    }
    return;
  }
  /* eight at a time: the upper four, then two, then one of each half move to where they belong */
  const uint64_t fours = (UINT64_C(1) << 4 * bits) - 1;
  const uint64_t twos = ((UINT64_C(1) << 2 * bits) - 1) * UINT64_C(0x0000000100000001);
  const uint64_t ones = ((UINT64_C(1) << bits) - 1) * UINT64_C(0x0001000100010001);
  for (size_t i = 0; i < n; i += 8, packed += bits) {
    uint64_t x = 0;
    if (bits == 1 || bits == 2) {
      memcpy(&x, packed, bits);
    } else if ((n - i) / 8 * bits >= 8) {
      memcpy(&x, packed, 8);
    } else { /* nothing may be read behind the last */
      memcpy(&x, packed + bits - 8, 8);
      x >>= 64 - 8 * bits;
    }
    x = (x & fours) | (x << (32 - 4 * bits) & fours << 32);
    x = (x & twos) | (x << (16 - 2 * bits) & twos << 16);
    x = (x & ones) | (x << (8 - bits) & ones << 8);
    memcpy(values + i, &x, 8);
  }
}

INLINE void affine(const uint8_t *packed, const void *scales, const void *biases, int kind, float *out,
                   size_t n_groups, size_t group_size, const int bits) {
  const size_t at_once = MOST / group_size; /* groups, so that what was just written is not read at once */
  for (size_t first = 0; first < n_groups; first += at_once) {
    const size_t n = n_groups - first < at_once ? n_groups - first : at_once;
    uint8_t unpacked[MOST];
    const uint8_t *values = unpacked;
    if (bits == 8) values = packed;
    else unpack(packed, unpacked, n * group_size, bits);
    for (size_t i = 0; i < n; i++) {
      const float scale = float_at(scales, kind, first + i), bias = float_at(biases, kind, first + i);
      for (size_t k = 0; k < group_size; k++) out[k] = (float)values[k] * scale + bias;
      values += group_size;
      out += group_size;
    }
    packed += n * group_size * bits / 8;
  }
}

/* Groups of integers, each to be multiplied by its group's scale, and its bias added. */
FOR_EVERY_PROCESSOR void slowft_affine(const uint8_t *packed, const void *scales, const void *biases, int kind,
                                       float *out, size_t n_groups, size_t group_size, int bits) {
  switch (bits) {
#define CASE(n) case n: affine(packed, scales, biases, kind, out, n_groups, group_size, n); break
    CASE(1); CASE(2); CASE(3); CASE(4); CASE(5); CASE(6); CASE(8);
  }
}

/* Groups of codes of 4 bits: `pairs` are the values of the two in a byte, `scale_values` those of a byte's scale. */
FOR_EVERY_PROCESSOR void slowft_codes4(const uint8_t *packed, const uint8_t *scales, const uint64_t *pairs,
                                       const float *scale_values, float *out, size_t n_groups, size_t group_size) {
  const size_t at_once = MOST / group_size;
  for (size_t first = 0; first < n_groups; first += at_once) {
    const size_t n = n_groups - first < at_once ? n_groups - first : at_once;
    float values[MOST], *value = values;
    for (size_t k = 0; k < n * group_size / 2; k++) memcpy(values + 2 * k, pairs + packed[k], 8);
    for (size_t i = 0; i < n; i++) {
      const float scale = scale_values[scales[first + i]];
      for (size_t k = 0; k < group_size; k++) out[k] = value[k] * scale;
      value += group_size;
      out += group_size;
    }
    packed += n * group_size / 2;
  }
}

/* The same of codes of 8 bits. */
FOR_EVERY_PROCESSOR void slowft_codes8(const uint8_t *packed, const uint8_t *scales, const float *values,
                                       const float *scale_values, float *out, size_t n_groups, size_t group_size) {
  for (size_t i = 0; i < n_groups; i++) {
    const float scale = scale_values[scales[i]];
    for (size_t k = 0; k < group_size; k++) out[k] = values[packed[k]] * scale;
    packed += group_size;
    out += group_size;
  }
}
