// What a GPU has, for the choice of tiles.
#pragma once

#include "csrc/cuda/kernels.h"

namespace effops::cuda {

// Of the GPU with this number; std::runtime_error where CUDA cannot tell, or it is older than sm_80.
Device device_info(int index);

}  // namespace effops::cuda
