// Rules that compare scales: four_over_six by three metrics, scale_search; in 1x16 or 16x16 blocks.
#include "quantize.h"
#include "rows.h"

namespace nvfp4::cuda {
namespace {

template <bool tiled>
Variant choose(const Operand& operand, bool down, bool wide) {
    if (operand.rule == Rule::scale_search)
        return variant_of<Scaled<ScaleSearch, tiled>>(down, wide);
    if (operand.rule != Rule::four_over_six) return {};
    switch (operand.metric) {
        case 0: return variant_of<Scaled<Squares, tiled>>(down, wide);
        case 1: return variant_of<Scaled<Magnitudes, tiled>>(down, wide);
        default: return variant_of<Scaled<Largest, tiled>>(down, wide);
    }
}

}  // namespace

Variant searched_variant(const Operand& operand, bool down, bool wide) {
    return operand.tiles ? choose<true>(operand, down, wide) : choose<false>(operand, down, wide);
}

RowsKernel searched_rows(const Operand& operand, bool wide) {
    if (operand.rule == Rule::scale_search) return rows_kernel_of<ScaleSearch<RowScope>>(wide);
    if (operand.rule != Rule::four_over_six) return nullptr;
    switch (operand.metric) {
        case 0: return rows_kernel_of<Squares<RowScope>>(wide);
        case 1: return rows_kernel_of<Magnitudes<RowScope>>(wide);
        default: return rows_kernel_of<Largest<RowScope>>(wide);
    }
}

}  // namespace nvfp4::cuda
