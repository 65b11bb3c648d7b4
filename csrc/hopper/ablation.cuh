// Parts of prefill GEMM1 and of GEMM2 with its sums left out, to find out where their time goes: `benchmarks/hopper.py --build
// --define GLM_WITHOUT_…`. The results are wrong then. Never in a wheel.
#pragma once

namespace glm_hopper {

#ifdef GLM_WITHOUT_PRODUCTS
constexpr bool with_products = false;
#else
constexpr bool with_products = true;
#endif
#ifdef GLM_WITHOUT_WEIGHTS
constexpr bool with_weights = false;
#else
constexpr bool with_weights = true;
#endif
#ifdef GLM_WITHOUT_GATHER
constexpr bool with_gather = false;
#else
constexpr bool with_gather = true;
#endif
#ifdef GLM_WITHOUT_OUTPUT
constexpr bool with_output = false;  // neither SwiGLU nor stores; of GEMM2: neither scales nor stores of partials
#else
constexpr bool with_output = true;
#endif
#ifdef GLM_WITHOUT_ROWS
constexpr bool with_rows = false;  // of act: not copied
#else
constexpr bool with_rows = true;
#endif
#ifdef GLM_WITHOUT_SUMS
constexpr bool with_sums = false;  // of partials: neither read nor stored
#else
constexpr bool with_sums = true;
#endif

}  // namespace glm_hopper
