// What the extensions take and offer, as a number: one more with each change that older Python code
// could not use, or newer could not find. nvfp4/backends/native/extension.py compares it, since a
// checkout may move on and its extensions stay.
#pragma once

namespace nvfp4 {
constexpr int kInterface = 2;
}  // namespace nvfp4
