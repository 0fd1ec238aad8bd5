// The version of what the extensions take and offer. It rises with every change after which Python
// code of one version would call what an extension of the other does not have.
// nvfp4/backends/native/extension.py compares it, since a checkout may move on and its extensions
// stay.
#pragma once

namespace nvfp4 {
constexpr int kInterface = 5;
}  // namespace nvfp4
