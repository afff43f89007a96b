// Kernels that keep the sums of a few tokens in registers have an instance for every number of them.
#pragma once

#include <cstdint>
#include <type_traits>

namespace entrenar {

// body(a constant: 1, 2, 3 or 4), for as many tokens. Static, as everything that is compiled under ISA flags.
template <class Body>
static inline void for_tokens(int64_t tokens, const Body& body) {
    switch (tokens) {
        case 1:
            return body(std::integral_constant<int, 1>{});
        case 2:
            return body(std::integral_constant<int, 2>{});
        case 3:
            return body(std::integral_constant<int, 3>{});
        default:
            return body(std::integral_constant<int, 4>{});
    }
}

}  // namespace entrenar
