// Codes and scales back to numbers. A row of 16 products per scale byte is looked up: all 127 fit in the L1 cache.
#pragma once

#include "panel.h"

NVFP4_BEGIN

struct Products {
    float value[128][16];
    uint16_t bfloat[128][16];  // e2m1 * e4m3 is exact in BF16

    Products() {
        for (uint32_t s = 0; s < 128; ++s)
            for (uint32_t c = 0; c < 16; ++c) {
                const float v = decode<E2M1, float>(c & 7u) * (s > E4M3::largest_code ? NAN : decode<E4M3, float>(s));
                value[s][c] = c & 8u ? -v : v;
                bfloat[s][c] = static_cast<uint16_t>(bits(value[s][c]) >> 16);
            }
    }
};

inline const Products& products() {
    static const Products table;
    return table;
}

NVFP4_FN void emit(float* out, Float x) { store(out, x); }
NVFP4_FN void emit_bfloat(uint16_t* out, Float x) {
    const Half h = __builtin_convertvector(bits(to_bfloat16(x)) >> 16, Half);
    memcpy(out, &h, sizeof h);
}

// The look-up itself, bound by the stores: sixteen BF16 values from eight bytes.
NVFP4_FN void look_up(const uint16_t* row, const uint8_t* bytes, uint16_t* out) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    uint64_t codes;
    memcpy(&codes, bytes, sizeof codes);
    // byte i to 16-bit lanes 2i and 2i + 1, the odd one shifted down to its high nibble
    const __m128i pair = _mm_cvtsi64_si128(static_cast<long long>(codes));
    const __m256i wide = _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(pair, pair));
    const __m256i index = _mm256_srlv_epi16(wide, _mm256_set1_epi32(4 << 16));
    const __m256i table = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permutexvar_epi16(index, table));
#else
    for (int i = 0; i < kBlock; ++i) out[i] = row[bytes[i / 2] >> (i % 2 * 4) & 15];
#endif
}

inline void decode_row(const DecodeArgs& args, int64_t r) {
    const Products& table = products();
    const CodeMatrix& m = args.matrix;
    const uint8_t* codes = m.codes + r * m.row_bytes;
    const uint8_t* scales = m.block_scale + r / m.scale_block_rows * m.scale_stride;
    const float global = m.global_scale ? m.global_scale[m.row_scaled ? r : 0] : 1.0f;
    for (int64_t c = 0; c < args.columns; c += kBlock) {
        const int64_t left = std::min<int64_t>(kBlock, args.columns - c), at = r * args.columns + c;
        const uint8_t scale = scales[c / kBlock] & 127;
        alignas(64) uint16_t half[kBlock];
        if (args.element == Element::bfloat16 && !m.global_scale) {
            uint16_t* out = static_cast<uint16_t*>(args.out) + at;
            look_up(table.bfloat[scale], codes + c / 2, left == kBlock ? out : half);
            if (left < kBlock) memcpy(out, half, sizeof(uint16_t) * static_cast<size_t>(left));
            continue;
        }
        alignas(64) float value[kBlock];
        store(value, decode_codes(unpack(codes + c / 2)) * (scale > E4M3::largest_code ? NAN : decode<E4M3, float>(scale)) * global);
        if (args.element == Element::float32) {
            memcpy(static_cast<float*>(args.out) + at, value, sizeof(float) * static_cast<size_t>(left));
            continue;
        }
        if (args.element == Element::bfloat16)
            emit_bfloat(half, load(value));
        else
            for (int i = 0; i < kBlock; ++i) half[i] = to_float16(value[i]);
        memcpy(static_cast<uint16_t*>(args.out) + at, half, sizeof(uint16_t) * static_cast<size_t>(left));
    }
}

inline void decode_matrix(const DecodeArgs& args) {
    const int threads = args.matrix.rows * args.columns < (1 << 16) ? 1 : args.threads;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < args.matrix.rows; ++r) decode_row(args, r);
}

NVFP4_END
