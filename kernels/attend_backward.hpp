#pragma once

#include "kernels/attend.hpp"

namespace dattn {

/// out [rows, heads, 1] = sum over d_v of d_o * o, both [rows, heads, d_v]: the delta of the
/// backward pass. Only the first number of each head of `out` is written, so that LSE may lie
/// beside it. A loss that depends on LSE too, with cotangent g, subtracts g from it. No bit depends
/// on the number of threads. @pre equal extents
void delta_of(View<const float> o, View<const float> d_o, View<float> out, int threads = 1);
void delta_of(View<const float> o, View<const BFloat16> d_o, View<float> out, int threads = 1);
void delta_of(View<const double> o, View<const double> d_o, View<double> out, int threads = 1);

/// The gradients of attention of q to k, v under `mask`, of what these keys contribute:
///   P = exp(score - lse), dV += P^T dO, dS = P (dO V^T - delta), dQ += scale dS K, dK += scale
///   dS^T Q
/// (with the derivative of a soft cap where there is one). lse and delta [rows, query heads, 1] are
/// of all keys, not only of these, and natural logarithms; where their heads have more numbers, the
/// first one is read (two views of pairs, the second begun one number later). -inf stands for a row
/// without keys, whose gradient is 0. Sigmoid attention reads neither: dS = P (1 - P) dO V^T.
///
/// dq [rows, query heads, d_qk], dk [keys, key heads, d_qk], dv [keys, value heads, d_v] are added
/// to, in float. The query heads of a group all add to their key and value head. The result does
/// not depend on the number of threads. Where Q, K, V or dO is not finite, gradients are not
/// confined to the rows that see it. Source: FlashAttention-2 (Dao 2023), algorithm 2.
/// @pre as attend
void attend_backward(View<const float> q, View<const float> k, View<const float> v,
                     View<const float> d_o, View<const float> lse, View<const float> delta,
                     View<float> dq, View<float> dk, View<float> dv, const Where& where,
                     const Mask& mask, const Work& work);

/// The same on bfloat16 inputs; gradients and every sum are kept in float.
void attend_backward(View<const BFloat16> q, View<const BFloat16> k, View<const BFloat16> v,
                     View<const BFloat16> d_o, View<const float> lse, View<const float> delta,
                     View<float> dq, View<float> dk, View<float> dv, const Where& where,
                     const Mask& mask, const Work& work);

/// Memory in bytes that attend_backward takes with this kernel beside its arguments, at most, for
/// `queries` rows of the query heads `query_heads` and `keys` rows of so many key heads.
Index attend_backward_bytes(const Shape& shape, Index queries, Range query_heads, Index keys,
                            Index key_heads, int threads, const Kernel& kernel);

/// The same in double, by the reference loops: exact to double rounding, and slow.
void attend_backward(View<const double> q, View<const double> k, View<const double> v,
                     View<const double> d_o, View<const double> lse, View<const double> delta,
                     View<double> dq, View<double> dk, View<double> dv, const Where& where,
                     const Mask& mask, const Work& work);

}  // namespace dattn
