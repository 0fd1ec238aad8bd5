// What does not depend on a policy: the order of launches, the amax, the block scales of MS-EDEN,
// decoding.
//
//     prepare   peaks and swizzled scales to zero
//     amax      for rules that scale from it, of one or both orientations in one read
//     quantise  one kernel for both orientations where there is one (fused_variant), else two
//     finish    MS-EDEN: the global scale from the largest r, then the block scales
#include "quantize.h"

namespace nvfp4::cuda {
namespace {

// The block scales of ms_eden, once the largest r is known: eight per thread, which share a Philox
// counter. Codes that were written before anything was known to be not finite are cleared.
__global__ void __launch_bounds__(kThreads) finish_kernel(const Operand operand) {
    const int64_t row_blocks = operand.padded / kBlock, count = operand.lines * row_blocks;
    const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    const int64_t first = index * 8;
    const uint32_t peak = operand.peak[0];
    const bool finite = peak < kInfinityBits;
    const float longest = from_bits(finite ? peak : 0u);
    const float global_scale = longest == 0.0f ? 1.0f : longest / E4M3::max;

    if (index == 0) operand.global_scale[0] = finite ? global_scale : from_bits(kNanBits);

    uint32_t word[4];
    philox<uint32_t>(value_of(operand.seed), static_cast<uint32_t>(index),
                     static_cast<uint32_t>(index >> 32), kBlockScaleStream, word);
    NVFP4_UNROLL(64)
    for (int i = 0; i < 8; ++i) {
        const int64_t n = first + i;
        if (n >= count) return;
        const float u = centred_uniform<float>(i % 2 == 0 ? word[i / 2] << 7 : word[i / 2] >> 9);
        uint32_t byte = 0;
        if (finite)
            byte = stochastic<E4M3>(smaller(operand.lengths[n] / global_scale, E4M3::max), u).code;
        else
            *reinterpret_cast<Pair*>(operand.codes + n * 8) = {0u, 0u};
        operand.block_scale[n] = static_cast<uint8_t>(byte);
        store_swizzled(operand, n / row_blocks, n % row_blocks, byte);
    }
}

NVFP4_DEVICE uint16_t to_half(float x, Element element) {
    return element == Element::float16 ? to_float16(x)
                                       : static_cast<uint16_t>(bits(to_bfloat16(x)) >> 16);
}

// The codes of a block: eight bytes, which one load takes where they lie on eight.
NVFP4_DEVICE Pair load_codes(const uint8_t* bytes, bool whole) {
    if (whole) return *reinterpret_cast<const Pair*>(bytes);
    uint32_t word[2] = {0u, 0u};
    NVFP4_UNROLL(64)
    for (int i = 0; i < 8; ++i) word[i / 4] |= static_cast<uint32_t>(bytes[i]) << (i % 4 * 8);
    return {word[0], word[1]};
}

// A block of sixteen per thread. whole: codes may be read eight bytes at a time; aligned: results
// written sixteen.
__global__ void __launch_bounds__(kThreads)
    decode_kernel(const CodeMatrix m, int64_t columns, Element element, void* out, bool whole,
                  bool aligned) {
    const int64_t across = ceil_div(columns, kBlock);
    const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    const int64_t row = n / across, column = n % across * kBlock;
    if (row >= m.rows) return;

    const Pair codes = load_codes(m.codes + row * m.row_bytes + column / 2, whole);
    const float scale =
        decode_scale(m.block_scale[row / m.scale_block_rows * m.scale_stride + column / kBlock]);
    const float global = m.global_scale ? m.global_scale[m.row_scaled ? row : 0] : 1.0f;
    float x[kBlock];
    NVFP4_UNROLL(64)
    for (int i = 0; i < kBlock; ++i) {
        const uint32_t code = (i < 8 ? codes.low : codes.high) >> (i % 8 * 4) & 15u;
        x[i] = decode_signed<float>(code) * scale * global;
    }

    const int64_t at = row * columns + column, inside = columns - column;
    if (element == Element::float32) {
        auto* to = static_cast<float*>(out) + at;
        if (aligned) {
            NVFP4_UNROLL(64)
            for (int c = 0; c < 4; ++c)
                reinterpret_cast<Chunk*>(to)[c] = {
                    {bits(x[4 * c]), bits(x[4 * c + 1]), bits(x[4 * c + 2]), bits(x[4 * c + 3])}};
        } else {
            NVFP4_UNROLL(64)
            for (int i = 0; i < kBlock; ++i)
                if (i < inside) to[i] = x[i];
        }
        return;
    }

    auto* to = static_cast<uint16_t*>(out) + at;
    uint32_t word[8];
    NVFP4_UNROLL(64)
    for (int i = 0; i < 8; ++i)
        word[i] = to_half(x[2 * i], element) | static_cast<uint32_t>(to_half(x[2 * i + 1], element))
                                                   << 16;
    if (aligned) {
        NVFP4_UNROLL(64)
        for (int c = 0; c < 2; ++c)
            reinterpret_cast<Chunk*>(to)[c] = {
                {word[4 * c], word[4 * c + 1], word[4 * c + 2], word[4 * c + 3]}};
    } else {
        NVFP4_UNROLL(64)
        for (int i = 0; i < kBlock; ++i)
            if (i < inside) to[i] = static_cast<uint16_t>(word[i / 2] >> (i % 2 * 16));
    }
}

// Whether the peak has to be found before anything is quantised.
bool wants_amax(const Operand& operand) {
    return operand.rule != Rule::ms_eden && !operand.knows_peak;
}

void launch_tiles(const Matrix& m, TileKernel kernel, int rows, const Operand& first,
                  const Operand& second, bool wide, void* stream) {
    const int64_t blocks = ceil_div(m.rows, rows) * ceil_div(m.columns, kTile);
    const int shared = wide ? kSharedBytes<uint32_t>(rows) : kSharedBytes<uint16_t>(rows);
    launch(kernel, blocks, kThreads, shared, stream, m, first, second);
}

template <class Stored>
TileKernel amax_kernel_of(bool rows, bool columns) {
    return rows && columns ? &amax_kernel<Stored, true, true>
           : rows          ? &amax_kernel<Stored, true, false>
                           : &amax_kernel<Stored, false, true>;
}

void launch_amax(const Matrix& m, const Operand& rows, const Operand& columns, bool wants_rows,
                 bool wants_columns, bool wide, void* stream) {
    if (!wants_rows && !wants_columns) return;
    const TileKernel kernel = wide ? amax_kernel_of<uint32_t>(wants_rows, wants_columns)
                                   : amax_kernel_of<uint16_t>(wants_rows, wants_columns);
    launch_tiles(m, kernel, wants_columns ? kTile : kFlatRows, rows, columns, wide, stream);
}

// Kernels raise the peak from zero, and the padding of swizzled scales is written by none of them.
void prepare(const Operand& operand, void* stream) {
    if (!operand.knows_peak)
        zero(operand.peak,
             sizeof(uint32_t) * static_cast<size_t>(operand.row_scaled ? operand.lines : 1),
             stream);
    const int64_t blocks = operand.padded / kBlock;
    if (operand.swizzled)
        zero(operand.swizzled,
             static_cast<size_t>(512 * ceil_div(operand.lines, 128) * ceil_div(blocks, 4)), stream);
}

void finish(const Operand& operand, void* stream) {
    if (operand.rule != Rule::ms_eden) return;
    launch(&finish_kernel, ceil_div(operand.lines * (operand.padded / kBlock), 8 * kThreads),
           kThreads, 0, stream, operand);
}

// Whether a tile holds the elements in 32 bits.
bool is_wide(const Matrix& m) {
    return m.element == Element::float32 || m.element == Element::float16;
}

Variant single_variant(const Operand& operand, bool down, bool wide) {
    switch (operand.rule) {
        case Rule::ms_eden: return eden_variant(operand, down, wide);
        case Rule::four_over_six:
        case Rule::scale_search: return searched_variant(operand, down, wide);
        default: return plain_variant(operand, down, wide);
    }
}

// Whether tensor cores rotate, where the operand allows it; false: nothing was launched.
bool launch_mma(const Matrix& m, const Variant& variant, const Operand& rows,
                const Operand& columns, void* stream) {
    if (variant.kernel == nullptr) return false;
    const int64_t blocks = ceil_div(m.rows, kTile) * ceil_div(m.columns, kTile);
    launch(variant.kernel, blocks, kThreads, mma_shared_bytes(), stream, m, rows, columns);
    return true;
}

void launch_single(const Matrix& m, const Operand& operand, bool down, void* stream) {
    if (launch_mma(m, mma_eden_variant(m, operand, down), operand, operand, stream)) {
        finish(operand, stream);
        return;
    }
    const bool wide = is_wide(m);
    const Variant variant = single_variant(operand, down, wide);
    launch_tiles(m, variant.kernel, variant.rows, operand, operand, wide, stream);
    finish(operand, stream);
}

}  // namespace

void quantize(const Matrix& m, const Operand& operand, bool down, int device, void* stream) {
    const OnDevice here(device);
    prepare(operand, stream);
    if (wants_amax(operand)) launch_amax(m, operand, operand, !down, down, is_wide(m), stream);
    launch_single(m, operand, down, stream);
}

bool fused(const Operand& rows, const Operand& columns) {
    return fused_variant(rows, columns, false).kernel != nullptr;
}

void quantize_both(const Matrix& m, const Operand& rows, const Operand& columns, int device,
                   void* stream) {
    const OnDevice here(device);
    const bool wide = is_wide(m);
    prepare(rows, stream);
    prepare(columns, stream);
    launch_amax(m, rows, columns, wants_amax(rows), wants_amax(columns), wide, stream);

    if (launch_mma(m, mma_eden_pair_variant(m, rows, columns), rows, columns, stream)) {
        finish(rows, stream);
        finish(columns, stream);
        return;
    }
    const Variant variant = fused_variant(rows, columns, wide);
    if (variant.kernel == nullptr) {
        launch_single(m, rows, false, stream);
        launch_single(m, columns, true, stream);
        return;
    }

    launch_tiles(m, variant.kernel, variant.rows, rows, columns, wide, stream);
    finish(rows, stream);
    finish(columns, stream);
}

void decode_matrix(const CodeMatrix& matrix, int64_t columns, Element element, void* out,
                   int device, void* stream) {
    const OnDevice here(device);
    const bool whole =
        matrix.row_bytes % 8 == 0 && reinterpret_cast<uintptr_t>(matrix.codes) % 8 == 0;
    const bool aligned = columns % kBlock == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0;
    const int64_t blocks = ceil_div(matrix.rows * ceil_div(columns, kBlock), kThreads);
    launch(&decode_kernel, blocks, kThreads, 0, stream, matrix, columns, element, out, whole,
           aligned);
}

int architectures(const int** list) {
#if defined(__CUDA_ARCH_LIST__)
    static const int built[] = {__CUDA_ARCH_LIST__};
    *list = built;
    return static_cast<int>(sizeof built / sizeof built[0]);
#else
    *list = nullptr;
    return 0;
#endif
}

}  // namespace nvfp4::cuda
