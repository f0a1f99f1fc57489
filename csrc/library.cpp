// The operators' schemas, defined for every backend. This library has no Python symbols: a C++ process can load it just
// as well.
#include <torch/csrc/stable/library.h>

#define EFFOPS_SCHEMA(schema) library.def(schema);
STABLE_TORCH_LIBRARY(effops, library) {
#include "effops/schemas.inc"
}
