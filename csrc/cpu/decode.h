// Codes and scales back to numbers: out[r, c] = e2m1(code) * e4m3(scale) (* global), one row per
// thread at a time, one block of sixteen columns at a time.
//
// Two ways. BF16 without a global scale is what a product of decoded operands reads, and exact: a
// table has the sixteen products of each of the 127 scale bytes (4 KB, which the L1 cache holds),
// and a shuffle looks all sixteen codes of a block up at once. Everything else multiplies kLanes
// values in float32 and rounds once.
#pragma once

#include <algorithm>

#include "elements.h"

NVFP4_BEGIN

struct Products {
    uint16_t bfloat[128][16];   // e2m1 * e4m3 is exact in BF16
    uint8_t bytes[128][2][16];  // the same, low bytes and high bytes apart

    Products() {
        for (uint32_t s = 0; s < 128; ++s)
            for (uint32_t c = 0; c < 16; ++c) {
                const float v = decode<E2M1, float>(c & 7u) * decode_scale(s);
                bfloat[s][c] = static_cast<uint16_t>(bits(c & 8u ? -v : v) >> 16);
                for (int half = 0; half < 2; ++half)
                    bytes[s][half][c] = static_cast<uint8_t>(bfloat[s][c] >> (8 * half));
            }
    }
};

inline const Products& products() {
    static const Products table;
    return table;
}

// The look-up itself, bound by the stores: sixteen BF16 values from eight bytes.
NVFP4_FN void look_up(const Products& products, uint8_t scale, const uint8_t* bytes,
                      uint16_t* out) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    uint64_t codes;
    memcpy(&codes, bytes, sizeof codes);
    // byte i to 16-bit lanes 2i and 2i + 1, the odd one shifted down to its high nibble
    const __m128i pair = _mm_cvtsi64_si128(static_cast<long long>(codes));
    const __m256i wide = _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(pair, pair));
    const __m256i index = _mm256_srlv_epi16(wide, _mm256_set1_epi32(4 << 16));
    const __m256i table =
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(products.bfloat[scale]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permutexvar_epi16(index, table));
#elif defined(__AVX2__)
    const __m128i pair = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes));
    const __m128i low = _mm_set1_epi8(15);
    const __m128i index =
        _mm_unpacklo_epi8(_mm_and_si128(pair, low), _mm_and_si128(_mm_srli_epi16(pair, 4), low));
    const auto* table = reinterpret_cast<const __m128i*>(products.bytes[scale]);
    const __m128i first = _mm_shuffle_epi8(_mm_loadu_si128(table), index);
    const __m128i second = _mm_shuffle_epi8(_mm_loadu_si128(table + 1), index);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_unpacklo_epi8(first, second));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out) + 1, _mm_unpackhi_epi8(first, second));
#elif defined(__ARM_NEON) && defined(__aarch64__)
    const uint8x8_t pair = vld1_u8(bytes);
    const uint8x8x2_t nibbles = vzip_u8(vand_u8(pair, vdup_n_u8(15)), vshr_n_u8(pair, 4));
    const uint8x16_t index = vcombine_u8(nibbles.val[0], nibbles.val[1]);
    const uint8x16_t first = vqtbl1q_u8(vld1q_u8(products.bytes[scale][0]), index);
    const uint8x16_t second = vqtbl1q_u8(vld1q_u8(products.bytes[scale][1]), index);
    const uint8x16x2_t halves = vzipq_u8(first, second);
    vst1q_u8(reinterpret_cast<uint8_t*>(out), halves.val[0]);
    vst1q_u8(reinterpret_cast<uint8_t*>(out + 8), halves.val[1]);
#else
    for (int i = 0; i < kBlock; ++i)
        out[i] = products.bfloat[scale][bytes[i / 2] >> (i % 2 * 4) & 15];
#endif
}

inline void decode_row(const DecodeArgs& args, int64_t r) {
    const Products& table = products();
    const CodeMatrix& m = args.matrix;
    const uint8_t* codes = m.codes + r * m.row_bytes;
    const uint8_t* scales = m.block_scale + r / m.scale_block_rows * m.scale_stride;
    const float global = m.global_scale ? m.global_scale[m.row_scaled ? r : 0] : 1.0f;
    const bool exact = args.element == Element::bfloat16 && !m.global_scale;

    for (int64_t c = 0; c < args.columns; c += kBlock) {
        const int64_t left = std::min<int64_t>(kBlock, args.columns - c);
        const int64_t at = r * args.columns + c;
        const uint8_t scale = scales[c / kBlock] & 127;

        if (exact) {
            uint16_t* out = static_cast<uint16_t*>(args.out) + at;
            uint16_t all[kBlock];
            look_up(table, scale, codes + c / 2, left == kBlock ? out : all);
            if (left < kBlock) memcpy(out, all, sizeof(uint16_t) * static_cast<size_t>(left));
            continue;
        }

        const float block_scale = decode_scale(scale);
        for (int64_t i = 0; i < left; i += kLanes) {
            const Float x = decode_codes(unpack(codes + (c + i) / 2)) * block_scale * global;
            write_some(args.element, args.out, at + i, x, left - i);
        }
    }
}

inline void decode_matrix(const DecodeArgs& args) {
    const int threads = args.matrix.rows * args.columns < (1 << 16) ? 1 : args.threads;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < args.matrix.rows; ++r) decode_row(args, r);
}

NVFP4_END
