// The largest magnitudes of an operand, which every rule but MS-EDEN has to know before it begins:
// of the tensor or of each row, after the rotation.
//
//     not rotated       line by line, straight from memory: the order of the elements is no matter.
//                       BF16 is compared as it lies there, twice as many per vector
//     rotated, codes    panel by panel, as they will be quantised
//     given             a caller's own amax, whose sign is not looked at
//
// Magnitudes are compared as the integers their bits are, so that a NaN comes out largest.
#pragma once

#include <atomic>
#include <vector>

#include "../scaling.h"
#include "rotation.h"

NVFP4_BEGIN

// Raises what several threads raise.
NVFP4_FN void raise(std::atomic<uint32_t>& to, uint32_t value) {
    uint32_t seen = to.load(std::memory_order_relaxed);
    while (seen < value && !to.compare_exchange_weak(seen, value, std::memory_order_relaxed)) {}
}

// Largest |x| as bits over contiguous elements; NaN comes out largest.
template <Element element>
uint32_t line_amax(const typename Reader<element>::Type* p, int64_t count) {
    uint32_t largest = 0;
    int64_t i = 0;

    // four vectors at a time, so that maxima do not wait for each other; of BF16 the 16 bits have
    // the order of the magnitudes
    if constexpr (element == Element::bfloat16) {
        constexpr int halves = 2 * kLanes;
        // signed: SSE2 has no other maximum
        typedef int16_t Halves __attribute__((vector_size(NVFP4_VECTOR_BYTES)));
        Halves most[4] = {};
        for (; i + 4 * halves <= count; i += 4 * halves) {
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
                Halves h;
                memcpy(&h, p + i + halves * j, sizeof h);
                h = h & static_cast<int16_t>(0x7fff);
                most[j] = h > most[j] ? h : most[j];
            }
        }
        for (int j = 0; j < 4; ++j)
            for (int k = 0; k < halves; ++k)
                largest = larger_bits(largest, static_cast<uint32_t>(most[j][k]) << 16);
    } else {
        Word most[4] = {};
        for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j)
                most[j] = larger_bits(
                    most[j], bits(Reader<element>::read(p + i + kLanes * j)) & 0x7fffffffu);
        }
        for (int j = 0; j < 4; ++j)
            largest = larger_bits(largest, lane_max_bits(from_bits(most[j])));
    }

    for (; i < count; i += kLanes)
        largest =
            larger_bits(largest, lane_max_bits(magnitude(read_some<element>(p + i, count - i))));
    return largest;
}

// The same of a matrix that is read line by line, along whichever stride is 1.
template <Element element>
uint32_t dense_amax(const QuantizeArgs& args) {
    const Source& source = args.source;
    const bool direct = source.row_stride == 1;
    const int64_t length = direct ? source.rows : source.columns;
    const int64_t stride = direct ? source.column_stride : source.row_stride;
    const int64_t lines = direct ? source.columns : source.rows;
    const auto* data = static_cast<const typename Reader<element>::Type*>(source.data);
    uint32_t largest = 0;
#pragma omp parallel for schedule(static) num_threads(threads_for(args)) reduction(max : largest)
    for (int64_t line = 0; line < lines; ++line)
        largest = larger_bits(largest, line_amax<element>(data + line * stride, length));
    return largest;
}

// Bits of the largest |x| of the rows of one part.
NVFP4_FN Word part_amax(const Panel& panel, int columns, int part) {
    Word most = {};
    for (int b = 0; b < columns / kBlock; ++b)
        most = larger_bits(most, bits(block_amax(block(panel, b, part))));
    return most;
}

NVFP4_FN uint32_t panel_amax(const Panel& panel, int columns) {
    Word most = {};
    for (int part = 0; part < kParts; ++part)
        most = larger_bits(most, part_amax(panel, columns, part));
    return lane_max_bits(from_bits(most));
}

// Bits of the largest |x| of each operand row, rotated; or of the amax that was given.
inline std::vector<uint32_t> row_amax(const QuantizeArgs& args) {
    const Rotation rotation(args.rotation);
    std::vector<uint32_t> largest(static_cast<size_t>(ceil_div(args.source.rows, kRows) * kRows),
                                  0u);
    if (args.amax) {
        memcpy(largest.data(), args.amax, static_cast<size_t>(args.source.rows) * sizeof(uint32_t));
        for (uint32_t& value : largest) value &= 0x7fffffffu;
        return largest;
    }

    // a band of rows is one thread's, hence no atomics
    for_panels(args, [&](Panel& panel, int64_t row, int64_t, int columns) {
        rotation.apply(panel, columns);
        for (int part = 0; part < kParts; ++part) {
            uint32_t* rows = &largest[static_cast<size_t>(row + part * kLanes)];
            store(rows, larger_bits(load(rows), part_amax(panel, columns, part)));
        }
    });
    return largest;
}

// Bits of the largest |x|, as it comes and after the operand's rotation; or of the amax that was
// given.
struct Amax {
    uint32_t dense, rotated;
};

inline Amax tensor_amax(const QuantizeArgs& args) {
    if (args.amax) {
        uint32_t given;
        memcpy(&given, args.amax, sizeof given);
        given &= 0x7fffffffu;
        return {given, given};
    }

    if (args.rotation.group == 0 && args.source.element != Element::codes) {
        const uint32_t largest =
            args.source.element == Element::float32    ? dense_amax<Element::float32>(args)
            : args.source.element == Element::bfloat16 ? dense_amax<Element::bfloat16>(args)
                                                       : dense_amax<Element::float16>(args);
        return {largest, largest};
    }

    const Rotation rotation(args.rotation);
    std::atomic<uint32_t> dense{0}, rotated{0};
    for_panels(args, [&](Panel& panel, int64_t, int64_t, int columns) {
        raise(dense, panel_amax(panel, columns));
        if (args.rotation.group == 0) return;
        rotation.apply(panel, columns);
        raise(rotated, panel_amax(panel, columns));
    });
    return {dense, args.rotation.group == 0 ? dense.load() : rotated.load()};
}

NVFP4_END
