// Sixty-four bits that tell whether memory still holds the same bytes: how a kept quantised weight
// knows that it is fresh, whoever wrote to the weight and by whatever means.
//
// Chunks of 64 KB are hashed side by side, each to 64 bits, and these one after the other. Within a
// chunk 128 sums of 32 bits run independently, so that it goes at the speed of memory. The value is
// the same on every processor and with any number of threads.
#pragma once

#include <algorithm>
#include <vector>

#include "../formats.h"

NVFP4_BEGIN

// One more 64-bit part into a hash. Invertible in either of them.
inline uint64_t mixed_in(uint64_t hash, uint64_t part) {
    hash = (hash ^ part) * 0x9E3779B97F4A7C15u;
    return hash ^ hash >> 32;
}

// 128 sums of 32 bits, each mixed as in MurmurHash3 (A. Appleby, public domain). Every step is
// invertible, so one changed word always shows; changes of several words of one sum escape with
// probability 2^-32, of several sums 2^-64.
inline uint64_t chunk_fingerprint(const uint8_t* bytes, int64_t count) {
    constexpr int kSums = 128, kVectors = 8, kTogether = kVectors * kLanes;
    constexpr int64_t stride = kSums * 4, width = kVectors * static_cast<int64_t>(sizeof(Word));
    uint64_t hash = static_cast<uint64_t>(count);

    // eight vectors of sums at a time, which is what registers hold; the chunk then comes from the
    // cache again
    for (int64_t group = 0; group < kSums / kTogether; ++group) {
        Word sum[kVectors] = {};
        for (int64_t at = 0; at < count; at += stride) {
            const int64_t from = at + group * width;
            Word data[kVectors] = {};  // beyond the end zeros, which ``count`` tells from others
            if (from + width <= count)
                memcpy(data, bytes + from, sizeof data);
            else if (from < count)
                memcpy(data, bytes + from, static_cast<size_t>(count - from));
#pragma GCC unroll 8
            for (int j = 0; j < kVectors; ++j) {
                const Word mixed = rotate_left(data[j] * 0xcc9e2d51u, 15) * 0x1b873593u;
                sum[j] = rotate_left(sum[j] ^ mixed, 13) * 5u + 0xe6546b64u;
            }
        }
        for (int j = 0; j < kVectors; ++j)
            for (int lane = 0; lane < kLanes; ++lane) hash = mixed_in(hash, sum[j][lane]);
    }
    return hash;
}

inline uint64_t fingerprint(const void* data, int64_t count, int threads) {
    constexpr int64_t chunk = 1 << 16;
    const int64_t chunks = ceil_div(count, chunk);
    std::vector<uint64_t> part(static_cast<size_t>(chunks));
    const auto* bytes = static_cast<const uint8_t*>(data);
#pragma omp parallel for schedule(static) num_threads(chunks < 16 ? 1 : threads)
    for (int64_t i = 0; i < chunks; ++i)
        part[static_cast<size_t>(i)] =
            chunk_fingerprint(bytes + i * chunk, std::min(chunk, count - i * chunk));

    uint64_t hash = static_cast<uint64_t>(count);
    for (const uint64_t p : part) hash = mixed_in(hash, p);
    return hash;
}

NVFP4_END
