// Routing: mean features of each modality, normalised, through a small ReLU network to a softmax over experts, and the
// mixture of the experts' logits.
//
// The mean features of a coalition are affine in its bits: what they are with every player absent, plus what each present
// player adds. Every output is one sum in a fixed order, so a GPU and a host differ by their exponential only.
#pragma once

#include <cmath>

#include "coalition.h"
#include "group.h"

namespace flmoe {

// One Linear of the network, stored input-major.
template <class T>
struct Dense {
  const T* weight;  // (in, out)
  const T* bias;    // (out,)
  int out;
};

constexpr int kMostRoutingLayers = 8;

template <class T>
struct Router {
  const T* absent;              // (M, H) mean features with every player absent
  const T* step;                // (n, H) what a player's presence adds to its modality's
  const std::int64_t* players;  // (M + 1,) a modality's players are players[m] .. players[m + 1] - 1
  int modalities, hidden;
  bool normalised;  // mean features become unit vectors
  T temperature;
  int layers;
  Dense<T> network[kMostRoutingLayers];

  // Widest row of features or hidden units.
  FLMOE_HD int widest() const {
    int width = modalities * hidden;
    for (int l = 0; l < layers; ++l) width = network[l].out > width ? network[l].out : width;
    return width;
  }
};

template <class T>
FLMOE_HD T mean_feature(const Router<T>& router, const std::uint64_t* coalition, int modality, int h) {
  T sum = router.absent[modality * router.hidden + h];
  for (std::int64_t p = router.players[modality]; p < router.players[modality + 1]; ++p) {
    if (test_player(coalition, p)) sum += router.step[p * router.hidden + h];
  }
  return sum;
}

// What a row is divided by to be a unit vector; rows of nearly nothing stay nearly nothing.
template <class T>
FLMOE_HD T row_norm(const T* row, int count) {
  T squares = 0;
  for (int h = 0; h < count; ++h) squares += row[h] * row[h];
  const T norm = std::sqrt(squares);
  return norm > T(1e-12) ? norm : T(1e-12);
}

template <class T>
FLMOE_HD T linear(const Dense<T>& layer, const T* in, int count, int j) {
  T sum = 0;
  for (int i = 0; i < count; ++i) sum += in[i] * layer.weight[static_cast<std::int64_t>(i) * layer.out + j];
  return sum + layer.bias[j];
}

// Weight of each of `count` experts, from their scores divided by the temperature.
template <class T>
FLMOE_HD void softmax(const T* scores, int count, T temperature, double* weights) {
  T top = scores[0];
  for (int e = 1; e < count; ++e) top = scores[e] > top ? scores[e] : top;
  double total = 0;
  for (int e = 0; e < count; ++e) {
    weights[e] = std::exp(static_cast<double>((scores[e] - top) / temperature));
    total += weights[e];
  }
  for (int e = 0; e < count; ++e) weights[e] /= total;
}

// Routing weights of one coalition. `rows` holds two rows of router.widest() and is shared by the group.
template <class T, class Group>
FLMOE_HD void route(const Router<T>& router, const std::uint64_t* coalition, const Group& group, T* rows,
                    double* weights) {
  int width = router.modalities * router.hidden;
  T* in = rows;
  T* out = rows + router.widest();
  for (int i = group.rank(); i < width; i += group.size()) {
    in[i] = mean_feature(router, coalition, i / router.hidden, i % router.hidden);
  }
  group.sync();
  if (router.normalised) {
    for (int m = group.rank(); m < router.modalities; m += group.size()) {
      out[m] = row_norm(in + m * router.hidden, router.hidden);
    }
    group.sync();
    for (int i = group.rank(); i < width; i += group.size()) in[i] /= out[i / router.hidden];
    group.sync();
  }
  for (int l = 0; l < router.layers; ++l) {
    const Dense<T>& layer = router.network[l];
    const bool last = l + 1 == router.layers;
    for (int j = group.rank(); j < layer.out; j += group.size()) {
      const T value = linear(layer, in, width, j);
      out[j] = last || value > 0 ? value : T(0);
    }
    group.sync();
    T* swap = in;
    in = out;
    out = swap;
    width = layer.out;
  }
  if (group.rank() == 0) softmax(in, width, router.temperature, weights);
  group.sync();
}

// Logit k of the mixture: the experts' (E, K), each times its weight.
FLMOE_HD double mixture(const double* logits, const double* weights, int experts, int classes, int k) {
  double sum = 0;
  for (int e = 0; e < experts; ++e) sum += weights[e] * logits[static_cast<std::int64_t>(e) * classes + k];
  return sum;
}

}  // namespace flmoe
