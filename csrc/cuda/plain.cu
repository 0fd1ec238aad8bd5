// Rules that round to one scale: rtn, sr, sr_te; of rows or columns, in 1x16 or 16x16 blocks.
#include "quantize.h"
#include "rows.h"

namespace nvfp4::cuda {
namespace {

template <bool tiled>
Variant choose(const Operand& operand, bool down, bool wide) {
    switch (operand.rule) {
        case Rule::rtn: return variant_of<Scaled<Nearest, tiled>>(down, wide);
        case Rule::sr: return variant_of<Scaled<Up, tiled>>(down, wide);
        case Rule::sr_te: return variant_of<Scaled<Clipped, tiled>>(down, wide);
        default: return {};
    }
}

}  // namespace

Variant plain_variant(const Operand& operand, bool down, bool wide) {
    return operand.tiles ? choose<true>(operand, down, wide) : choose<false>(operand, down, wide);
}

RowsKernel plain_rows(const Operand& operand, bool wide) {
    switch (operand.rule) {
        case Rule::rtn: return rows_kernel_of<Nearest<RowScope>>(wide);
        case Rule::sr: return rows_kernel_of<Up<RowScope>>(wide);
        case Rule::sr_te: return rows_kernel_of<Clipped<RowScope>>(wide);
        default: return nullptr;
    }
}

}  // namespace nvfp4::cuda
