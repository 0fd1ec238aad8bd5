// What does not depend on a policy: the order of launches, the amax, the block scales of MS-EDEN,
// decoding.
//
//     prepare   peaks and swizzled scales to zero
//     amax      for rules that scale from it: as memory lies where nothing is rotated (amax.h), of
//               tiles else, of one or both orientations in one read
//     quantise  one kernel for both orientations where there is one (fused_variant), else two
//     finish    MS-EDEN: the global scale from the largest r, then the block scales
#include <algorithm>

#include "quantize.h"
#include "rows.h"

namespace nvfp4::cuda {
namespace {

// What ms_eden's block scales are made of, once the largest r is known.
struct Finish {
    float global_scale;
    bool finite;
    NVFP4_FN explicit Finish(uint32_t peak) : finite(peak < kInfinityBits) {
        const float longest = from_bits(finite ? peak : 0u);
        global_scale = longest == 0.0f ? 1.0f : longest / E4M3::max;
    }

    // Draw number i of eight, which share a Philox counter.
    NVFP4_FN uint32_t scale(float length, const uint32_t (&word)[4], int i) const {
        const float u = centred_uniform<float>(i % 2 == 0 ? word[i / 2] << 7 : word[i / 2] >> 9);
        const float share = smaller(length / global_scale, E4M3::max);
        return stochastic<E4M3>(share, u).code;
    }
};

NVFP4_DEVICE void draw_eight(const Operand& operand, int64_t index, uint32_t (&word)[4]) {
    philox<uint32_t>(value_of(operand.seed), static_cast<uint32_t>(index),
                     static_cast<uint32_t>(index >> 32), kBlockScaleStream, word);
}

// Eight block scales per thread. Codes that were written before anything was known to be not finite
// are cleared.
__global__ void __launch_bounds__(kThreads) finish_kernel(const Operand operand) {
    const int64_t row_blocks = operand.padded / kBlock, count = operand.lines * row_blocks;
    const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    const Finish finish(operand.peak[0]);
    if (index == 0)
        operand.global_scale[0] = finish.finite ? finish.global_scale : from_bits(kNanBits);

    uint32_t word[4];
    draw_eight(operand, index, word);
    NVFP4_UNROLL(64)
    for (int i = 0; i < 8; ++i) {
        const int64_t n = index * 8 + i;
        if (n >= count) return;
        const uint32_t byte = finish.finite ? finish.scale(operand.lengths[n], word, i) : 0u;
        if (!finish.finite) *reinterpret_cast<Pair*>(operand.codes + n * 8) = {0u, 0u};
        operand.block_scale[n] = static_cast<uint8_t>(byte);
        store_swizzled(operand, n / row_blocks, n % row_blocks, byte);
    }
}

// The same where the eight lie in one row, as in groups of 128 they always do: two loads, one store,
// and two of four scales that are neighbours as tensor cores read them, too. eights: in all rows,
// across: in a row.
__global__ void __launch_bounds__(kThreads)
    finish_eights_kernel(const Operand operand, uint32_t eights, uint32_t across,
                         Divider by_across) {
    const uint32_t index = blockIdx.x * kThreads + threadIdx.x;
    if (index >= eights) return;
    const Chunk* at =
        reinterpret_cast<const Chunk*>(operand.lengths) + 2 * static_cast<size_t>(index);
    const Chunk length[2] = {at[0], at[1]};
    const Finish finish(operand.peak[0]);
    if (index == 0)
        operand.global_scale[0] = finish.finite ? finish.global_scale : from_bits(kNanBits);

    uint32_t word[4], four[2] = {0u, 0u};
    draw_eight(operand, index, word);
    NVFP4_UNROLL(64)
    for (int i = 0; i < 8; ++i)
        four[i / 4] |= finish.scale(from_bits(length[i / 4].word[i % 4]), word, i) << (i % 4 * 8);
    if (!finish.finite) four[0] = four[1] = 0u;
    reinterpret_cast<Pair*>(operand.block_scale)[index] = {four[0], four[1]};
    if (operand.swizzled != nullptr) {
        const uint32_t row = by_across.of(index), column = 8 * (index - row * across);
        NVFP4_UNROLL(2)
        for (int i = 0; i < 2; ++i)
            *reinterpret_cast<uint32_t*>(
                operand.swizzled + swizzled_offset<uint32_t>(row, column + 4 * i, 8 * across)) =
                four[i];
    }
    if (finish.finite) return;
    NVFP4_UNROLL(4)
    for (int i = 0; i < 4; ++i)
        reinterpret_cast<Chunk*>(operand.codes)[4 * static_cast<size_t>(index) + i] = {};
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

// Whether a tile holds the elements in 32 bits.
bool is_wide(const Matrix& m) {
    return m.element == Element::float32 || m.element == Element::float16;
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

// Whether rows are whole pieces of so many elements that begin on 16 bytes.
bool has_whole_rows(const Matrix& m, int64_t elements) {
    const bool known = m.element == Element::bfloat16 || m.element == Element::float32;
    return known && m.aligned && m.columns % elements == 0;
}

// Elements in 16 bytes.
int64_t per_chunk(const Matrix& m) { return is_wide(m) ? 4 : 8; }

// Whether the amax of an operand, either way round, is that of memory as it lies.
bool is_flat(const Matrix& m, const Operand& operand) {
    return operand.group == 0 && !operand.row_scaled && m.row_stride == m.columns &&
           has_whole_rows(m, per_chunk(m));
}

void launch_flat_amax(const Matrix& m, uint32_t* first, uint32_t* second, int device,
                      void* stream) {
    const int64_t count = m.rows * (m.columns / per_chunk(m));
    const int64_t blocks = std::min(ceil_div(count, kThreads), 4 * multiprocessors(device));
    launch(is_wide(m) ? &flat_amax_kernel<uint32_t> : &flat_amax_kernel<uint16_t>, blocks, kThreads,
           kWarps * static_cast<int>(sizeof(uint32_t)), stream, static_cast<const Chunk*>(m.data),
           count, first, second);
}

void launch_lines_amax(const Matrix& m, uint32_t* peak, void* stream) {
    const int64_t per = per_chunk(m);
    launch(is_wide(m) ? &lines_amax_kernel<uint32_t> : &lines_amax_kernel<uint16_t>,
           ceil_div(m.rows, kWarps), kThreads, 0, stream, static_cast<const Chunk*>(m.data), m.rows,
           m.columns / per, m.row_stride / per, peak);
}

void launch_amax(const Matrix& m, const Operand& rows, const Operand& columns, bool wants_rows,
                 bool wants_columns, int device, void* stream) {
    // what memory as it lies can tell
    const bool flat_rows = wants_rows && is_flat(m, rows);
    const bool flat_columns = wants_columns && is_flat(m, columns);
    if (flat_rows || flat_columns)
        launch_flat_amax(m, flat_rows ? rows.peak : nullptr, flat_columns ? columns.peak : nullptr,
                         device, stream);
    const bool by_row =
        wants_rows && rows.row_scaled && rows.group == 0 && has_whole_rows(m, per_chunk(m));
    if (by_row) launch_lines_amax(m, rows.peak, stream);
    wants_rows = wants_rows && !flat_rows && !by_row;
    wants_columns = wants_columns && !flat_columns;

    // the others by tiles
    if (!wants_rows && !wants_columns) return;
    const bool wide = is_wide(m);
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

bool begins_on(size_t bytes, const void* at) {
    return reinterpret_cast<uintptr_t>(at) % bytes == 0;
}

void finish(const Operand& operand, void* stream) {
    if (operand.rule != Rule::ms_eden) return;
    const int64_t across = operand.padded / kBlock, eights = ceil_div(operand.lines * across, 8);
    const bool aligned = begins_on(16, operand.lengths) && begins_on(8, operand.block_scale) &&
                         begins_on(4, operand.swizzled) && begins_on(16, operand.codes);
    if (aligned && across % 8 == 0 && eights <= (1 << 27)) {
        const auto in_row = static_cast<uint32_t>(across / 8);
        launch(&finish_eights_kernel, ceil_div(eights, kThreads), kThreads, 0, stream, operand,
               static_cast<uint32_t>(eights), in_row, divider(in_row));
    } else {
        launch(&finish_kernel, ceil_div(eights, kThreads), kThreads, 0, stream, operand);
    }
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

// The kernel that needs no tile; null where there is none.
RowsKernel rows_kernel_for(const Matrix& m, const Operand& operand) {
    constexpr int64_t most = 1 << 30;  // offsets in 32 bits
    if (operand.tiles || operand.group != 0 || !has_whole_rows(m, kBlock)) return nullptr;
    if (m.rows * (m.columns / kBlock) > most) return nullptr;
    switch (operand.rule) {
        case Rule::ms_eden: return nullptr;
        case Rule::four_over_six:
        case Rule::scale_search: return searched_rows(operand, is_wide(m));
        default: return plain_rows(operand, is_wide(m));
    }
}

void launch_single(const Matrix& m, const Operand& operand, bool down, void* stream) {
    if (launch_mma(m, mma_eden_variant(m, operand, down), operand, operand, stream)) {
        finish(operand, stream);
        return;
    }
    const RowsKernel straight = down ? nullptr : rows_kernel_for(m, operand);
    if (straight != nullptr) {
        const auto across = static_cast<uint32_t>(m.columns / kBlock);
        const Rows rows{m.data, m.row_stride, static_cast<uint32_t>(m.rows) * across, across,
                        divider(across)};
        launch(straight, ceil_div(rows.blocks, kHeld * kThreads), kThreads,
               static_cast<int>(sizeof(Scales)), stream, rows, operand);
        return;
    }

    const bool wide = is_wide(m);
    const Variant usual = eden128_variant(m, operand, down);
    const Variant variant = usual.kernel ? usual : single_variant(operand, down, wide);
    launch_tiles(m, variant.kernel, variant.rows, operand, operand, wide, stream);
    finish(operand, stream);
}

}  // namespace

void quantize(const Matrix& m, const Operand& operand, bool down, int device, void* stream) {
    const OnDevice here(device);
    prepare(operand, stream);
    if (wants_amax(operand)) launch_amax(m, operand, operand, !down, down, device, stream);
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
    launch_amax(m, rows, columns, wants_amax(rows), wants_amax(columns), device, stream);

    if (launch_mma(m, mma_eden_pair_variant(m, rows, columns), rows, columns, stream)) {
        finish(rows, stream);
        finish(columns, stream);
        return;
    }
    const Variant usual = eden128_pair_variant(m, rows, columns);
    const Variant variant = usual.kernel ? usual : fused_variant(rows, columns, wide);
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
