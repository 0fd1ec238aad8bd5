// A library with cuBLASLt's functions that multiplies on the host, for tests of the calls: it checks
// every descriptor, and refuses with a status of its own what the real one would be wrong about.
#include <cstdint>
#include <cstring>
#include <map>

namespace {
struct Descriptor {
    int compute = 0, scale = 0;
    std::map<int, uint64_t> attributes;
};
struct Layout {
    int type;
    uint64_t rows, columns;
    int64_t stride;
};
struct Heuristic {
    uint64_t algorithm[8];
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};
float wide(const void* memory, int type, uint64_t at) {
    if (type == 0) return static_cast<const float*>(memory)[at];
    const uint16_t bits = static_cast<const uint16_t*>(memory)[at];
    float value;
    if (type == 14) {
        const uint32_t word = uint32_t(bits) << 16;
        memcpy(&value, &word, 4);
    } else {
        _Float16 half;
        memcpy(&half, &bits, 2);
        value = half;
    }
    return value;
}
void put(void* memory, int type, uint64_t at, float value) {
    uint16_t bits;
    if (type == 14) {
        uint32_t word;
        memcpy(&word, &value, 4);
        if ((word & 0x7fffffffu) > 0x7f800000u)
            word = 0x7fc00000u;
        else
            word += 0x7fffu + (word >> 16 & 1);
        bits = uint16_t(word >> 16);
    } else {
        const _Float16 half = static_cast<_Float16>(value);
        memcpy(&bits, &half, 2);
    }
    static_cast<uint16_t*>(memory)[at] = bits;
}
}  // namespace

extern "C" {
int calls = 0, refuse = 0;
int cublasLtCreate(void** handle) {
    *handle = &calls;
    return 0;
}
int cublasLtMatmulDescCreate(Descriptor** made, int compute, int scale) {
    *made = new Descriptor{compute, scale, {}};
    return compute == 68 && scale == 0 ? 0 : 7;
}
int cublasLtMatmulDescSetAttribute(Descriptor* d, int attribute, const void* value, size_t size) {
    if (size != (attribute == 8 ? 8u : 4u)) return 7;
    uint64_t number = 0;
    memcpy(&number, value, size);
    d->attributes[attribute] = number;
    return 0;
}
int cublasLtMatrixLayoutCreate(Layout** made, int type, uint64_t rows, uint64_t columns,
                               int64_t stride) {
    *made = new Layout{type, rows, columns, stride};
    return 0;
}
int cublasLtMatmulPreferenceCreate(Descriptor** made) {
    *made = new Descriptor;
    return 0;
}
int cublasLtMatmulPreferenceSetAttribute(Descriptor* d, int attribute, const void* value,
                                         size_t size) {
    return cublasLtMatmulDescSetAttribute(d, attribute == 1 ? 8 : attribute + 100, value, size);
}
int cublasLtMatmulAlgoGetHeuristic(void* handle, Descriptor*, Layout*, Layout*, Layout*, Layout*,
                                   Descriptor* preference, int wanted, Heuristic* found,
                                   int* count) {
    if (handle != &calls || wanted != 1 || refuse) return 15;
    if (preference->attributes[8] != 32u << 20 || preference->attributes[103] != 2) return 7;
    for (int each = 5; each <= 8; ++each)
        if (preference->attributes[100 + each] != 16) return 7;
    *found = Heuristic{{42}, 0, 0, 1, {}};
    *count = 1;
    return 0;
}
int cublasLtMatmul(void* handle, Descriptor* d, const float* alpha, const void* A, Layout* la,
                   const void* B, Layout* lb, const float* beta, const void* C, Layout* lc, void* D,
                   Layout* ld, const uint64_t* algorithm, void* workspace, size_t bytes, void*) {
    if (handle != &calls || algorithm[0] != 42 || !workspace || bytes != 32u << 20) return 7;
    // both scalars on the device, A transposed, B not
    if (d->attributes[2] != 1 || d->attributes[3] != 1 || d->attributes[4] != 0) return 7;
    if (C != D || lc != ld || *beta != 0) return 7;
    if (la->rows != lb->rows || ld->rows != la->columns || ld->columns != lb->columns) return 7;
    const bool biased = d->attributes[7] == 4;
    const void* bias = reinterpret_cast<const void*>(d->attributes[8]);
    if (biased && d->attributes[26] != uint64_t(ld->type)) return 7;
    ++calls;
    for (uint64_t j = 0; j < ld->columns; ++j)
        for (uint64_t i = 0; i < ld->rows; ++i) {
            float sum = 0;
            for (uint64_t k = 0; k < la->rows; ++k)
                sum +=
                    wide(A, la->type, i * la->stride + k) * wide(B, lb->type, j * lb->stride + k);
            sum *= *alpha;
            if (biased) sum += wide(bias, ld->type, i);
            put(D, ld->type, j * ld->stride + i, sum);
        }
    return 0;
}
}
