// The sparse operations of kernels.py for CPUs, compiled on first use (kernels.py says which it replaces and when).
//
// Letters: B tokens in a batch, D width, F latents, K kept latents.
//
// encode_top_k finds the K largest of x @ W^T + b per token without writing the (B, F) matrix. Tokens and latents are
// rounded to 16-bit integers, whose products run at twice the speed of float32's. What rounding can have changed has a
// bound, by Cauchy-Schwarz: |x.w - x'.w'| <= |x - x'| |w| + |x'| |w - w'|. With it every product becomes an interval;
// latents whose upper end is below the K-th best lower end cannot be among the K best, and the few others are computed
// again in float32. A token whose candidates do not prove this is done again with nothing assumed.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#if defined(__AVX512BW__) || defined(__AVX2__)
#include <immintrin.h>
#endif

using at::Tensor;

namespace {

constexpr int64_t LANES = 32;   // latents in a tile
constexpr int64_t PANEL = 252;  // tokens that a thread takes through all latents at a time
constexpr int64_t PILOT = 28;   // tokens that tell what to expect of the others

// f(begin, end) for all blocks of [0, n), of `least` to `most`. Each thread takes the next one left: some hold more work
// than others, and other programs may keep a core for a while.
template <class F>
void by_blocks(int64_t n, int64_t most, const F& f, int64_t least = 1) {
  const int64_t threads = at::get_num_threads(), size = std::max(least, std::min(most, n / (4 * threads)));
  const int64_t count = (n + size - 1) / size;
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min(count, threads), 1, [&](int64_t, int64_t) {
    for (int64_t p; (p = next++) < count;) f(p * size, std::min(n, (p + 1) * size));
  });
}

// ------------------------------------------------------------------------------------------------
// integer products: out[r][lane] = sum over d of x[r][d] * w[lane][d], w laid out [D/2][LANES][2]

#if defined(__AVX512BW__)

constexpr int TOKENS = 14;

inline __m512i multiply_add(__m512i sum, __m512i a, __m512i b) {
#if defined(__AVX512VNNI__)
  return _mm512_dpwssd_epi32(sum, a, b);
#else
  return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
#endif
}

void tile(const int16_t* const* x, const int16_t* w, int64_t n_pairs, int32_t* out) {
  __m512i low[TOKENS], high[TOKENS];
#pragma GCC unroll 14  // every index a constant, or sums would live in memory
  for (int r = 0; r < TOKENS; r++) low[r] = high[r] = _mm512_setzero_si512();
  for (int64_t d = 0; d < n_pairs; d++, w += 2 * LANES) {
    const __m512i w0 = _mm512_load_si512(w), w1 = _mm512_load_si512(w + LANES);
#pragma GCC unroll 14
    for (int r = 0; r < TOKENS; r++) {
      int32_t pair;
      std::memcpy(&pair, x[r] + 2 * d, 4);
      const __m512i both = _mm512_set1_epi32(pair);
      low[r] = multiply_add(low[r], both, w0);
      high[r] = multiply_add(high[r], both, w1);
    }
  }
#pragma GCC unroll 14
  for (int r = 0; r < TOKENS; r++) {
    _mm512_storeu_si512(out + LANES * r, low[r]);
    _mm512_storeu_si512(out + LANES * r + 16, high[r]);
  }
}

#elif defined(__AVX2__)

constexpr int TOKENS = 6;

void tile(const int16_t* const* x, const int16_t* w, int64_t n_pairs, int32_t* out) {
  for (int64_t half = 0; half < 2; half++) {
    __m256i low[TOKENS], high[TOKENS];
#pragma GCC unroll 6  // every index a constant, or sums would live in memory
    for (int r = 0; r < TOKENS; r++) low[r] = high[r] = _mm256_setzero_si256();
    const int16_t* at = w + half * LANES;
    for (int64_t d = 0; d < n_pairs; d++, at += 2 * LANES) {
      const __m256i w0 = _mm256_load_si256((const __m256i*)at), w1 = _mm256_load_si256((const __m256i*)(at + 16));
#pragma GCC unroll 6
      for (int r = 0; r < TOKENS; r++) {
        int32_t pair;
        std::memcpy(&pair, x[r] + 2 * d, 4);
        const __m256i both = _mm256_set1_epi32(pair);
        low[r] = _mm256_add_epi32(low[r], _mm256_madd_epi16(both, w0));
        high[r] = _mm256_add_epi32(high[r], _mm256_madd_epi16(both, w1));
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < TOKENS; r++) {
      _mm256_storeu_si256((__m256i*)(out + LANES * r + 16 * half), low[r]);
      _mm256_storeu_si256((__m256i*)(out + LANES * r + 16 * half + 8), high[r]);
    }
  }
}

#else

constexpr int TOKENS = 4;

void tile(const int16_t* const* x, const int16_t* w, int64_t n_pairs, int32_t* out) {
  std::memset(out, 0, sizeof(int32_t) * TOKENS * LANES);
  for (int64_t d = 0; d < n_pairs; d++, w += 2 * LANES)
    for (int r = 0; r < TOKENS; r++) {
      const int32_t a = x[r][2 * d], b = x[r][2 * d + 1];
      for (int64_t l = 0; l < LANES; l++) out[LANES * r + l] += a * w[2 * l] + b * w[2 * l + 1];
    }
}

#endif

// ------------------------------------------------------------------------------------------------
// float32 pieces

float dot(const float* a, const float* b, int64_t n) {
  constexpr int64_t W = 64;  // sums side by side: the compiler keeps them in registers
  float sums[W] = {};
  int64_t i = 0;
  for (; i + W <= n; i += W)
    for (int64_t l = 0; l < W; l++) sums[l] += a[i + l] * b[i + l];
  float rest = 0;
  for (; i < n; i++) rest += a[i] * b[i];
  for (int64_t half = W / 2; half; half /= 2)
    for (int64_t l = 0; l < half; l++) sums[l] += sums[l + half];
  return sums[0] + rest;
}

void add_scaled(float* to, const float* from, float by, int64_t n) {
  for (int64_t i = 0; i < n; i++) to[i] += by * from[i];
}

constexpr int64_t LINE = 16;  // floats
typedef float Line __attribute__((vector_size(64)));
typedef float HalfLine __attribute__((vector_size(32)));
typedef float QuarterLine __attribute__((vector_size(16)));

template <class Vector>
inline Vector load(const void* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof(Vector));
  return vector;
}

inline float sum_of(const Line& line) {
  const HalfLine half = load<HalfLine>(&line) + load<HalfLine>((const char*)&line + 32);
  const QuarterLine quarter = load<QuarterLine>(&half) + load<QuarterLine>((const char*)&half + 16);
  return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}

#if defined(__AVX512F__)
constexpr int64_t ROWS = 8;  // that are read side by side, as registers allow
#else
constexpr int64_t ROWS = 4;
#endif

struct Pass {         // over rows of n floats
  int64_t n;
  float* to;          // becomes, or if not fresh gets added, the sum of by[r] * rows[r]
  bool fresh;
  const float* a;     // whose products with the rows are dots[r]
  const float* rows[ROWS];
  float by[ROWS], dots[ROWS];

  template <int N, bool SUM, bool DOTS>
  void take() {
    Line sums[N] = {};
    int64_t i = 0;
    for (; i + LINE <= n; i += LINE) {
      Line sum = {}, x = {};
      if (SUM && !fresh) sum = load<Line>(to + i);
      if (DOTS) x = load<Line>(a + i);
#pragma GCC unroll 8
      for (int r = 0; r < N; r++) {
        const Line row = load<Line>(rows[r] + i);
        if (SUM) sum += by[r] * row;
        if (DOTS) sums[r] += x * row;
      }
      if (SUM) std::memcpy(to + i, &sum, sizeof(Line));
    }
#pragma GCC unroll 8
    for (int r = 0; r < N; r++)
      if (DOTS) dots[r] = sum_of(sums[r]);
    for (; i < n; i++) {
      float sum = SUM && !fresh ? to[i] : 0;
      for (int r = 0; r < N; r++) {
        if (SUM) sum += by[r] * rows[r][i];
        if (DOTS) dots[r] += a[i] * rows[r][i];
      }
      if (SUM) to[i] = sum;
    }
  }

  template <bool SUM, bool DOTS, int N = ROWS>
  void take(int64_t n_rows) {
    if constexpr (N > 0) {
      if (n_rows == N) take<N, SUM, DOTS>();
      else take<SUM, DOTS, N - 1>(n_rows);
    }
  }
};

// Over places p in [first, last): `to` (n,) becomes `start` or 0 plus the sum of value(p) * row(p), unless it is null; and
// dot(p, a . row(p)) is called for each, unless a is null.
template <bool SUM, bool DOTS, class Row, class Value, class Dot>
void each_row(
    int64_t first, int64_t last, int64_t n, const Row& row, const Value& value, const float* start, float* to,
    const float* a, const Dot& dot) {
  if (SUM && start) std::memcpy(to, start, sizeof(float) * n);
  else if (SUM && first == last) std::memset(to, 0, sizeof(float) * n);
  Pass pass{n, to, !start, a, {}, {}, {}};
  for (int64_t p = first; p < last; p += ROWS) {
    const int64_t count = std::min(ROWS, last - p);
    for (int64_t r = 0; r < count; r++) {
      pass.rows[r] = row(p + r);
      if (SUM) pass.by[r] = value(p + r);
    }
    pass.take<SUM, DOTS>(count);
    for (int64_t r = 0; DOTS && r < count; r++) dot(p + r, pass.dots[r]);
    pass.fresh = false;
  }
}

template <class Row, class Value>
void sum_rows(float* to, const float* start, int64_t first, int64_t last, int64_t n, const Row& row, const Value& value) {
  each_row<true, false>(first, last, n, row, value, start, to, nullptr, [](int64_t, float) {});
}

template <class Row, class Dot>
void dot_rows(const float* a, int64_t first, int64_t last, int64_t n, const Row& row, const Dot& dot) {
  each_row<false, true>(first, last, n, row, [](int64_t) { return 0.f; }, nullptr, nullptr, a, dot);
}

float largest(const float* a, int64_t n) {
  float most = 0;
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < n; i++) most = std::max(most, std::fabs(a[i]));
  return most;
}

// ------------------------------------------------------------------------------------------------
// rounding to 16 bits

struct Rounded {
  std::vector<float> unit;   // a row is unit * integers, about
  std::vector<float> norm;   // of the row
  std::vector<float> error;  // norm of what rounding changed
  int16_t* data = nullptr;
  Tensor memory;
};

// Any sum of products stays below 2^31, since no row's integers have a norm above 46340 = sqrt(2^31).
float unit_of(const float* row, int64_t D, float& norm) {
  norm = std::sqrt(dot(row, row, D));
  const float room = 46338.0f - 0.5f * std::sqrt((float)D);
  const float unit = std::max(norm / room, largest(row, D) / 32766.0f);
  return unit > 0 ? unit : 1.0f;
}

Tensor aligned(int64_t n) {  // 64 bytes: torch's own alignment
  return at::empty({n}, at::TensorOptions().dtype(at::kShort));
}

Rounded round_tokens(const float* x, int64_t B, int64_t D, int64_t width) {
  Rounded r{std::vector<float>(B), std::vector<float>(B), std::vector<float>(B)};
  r.memory = aligned(B * width);
  r.data = r.memory.mutable_data_ptr<int16_t>();
  by_blocks(B, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      r.unit[i] = unit_of(x + i * D, D, r.norm[i]);
      const float per_unit = 1 / r.unit[i];
      float error = 0;
      int16_t* to = r.data + i * width;
#pragma omp simd reduction(+ : error)
      for (int64_t d = 0; d < D; d++) {
        const float q = std::nearbyintf(x[i * D + d] * per_unit);
        const float left = x[i * D + d] - q * r.unit[i];
        error += left * left;
        to[d] = (int16_t)(int32_t)q;
      }
      for (int64_t d = D; d < width; d++) to[d] = 0;
      r.error[i] = std::sqrt(error) * 1.001f;
    }
  });
  return r;
}

Rounded round_latents(const float* W, int64_t F, int64_t D, int64_t width) {
  const int64_t n_tiles = (F + LANES - 1) / LANES, padded = n_tiles * LANES;
  Rounded r{std::vector<float>(padded, 0.f), std::vector<float>(padded, 0.f), std::vector<float>(padded, 0.f)};
  r.memory = aligned(padded * width);
  r.data = r.memory.mutable_data_ptr<int16_t>();
  by_blocks(n_tiles, 8, [&](int64_t begin, int64_t end) {
    std::vector<int16_t> row(width);
    for (int64_t t = begin; t < end; t++) {
      int32_t* to = (int32_t*)(r.data + t * LANES * width);
      for (int64_t l = 0; l < LANES; l++) {
        const int64_t f = t * LANES + l;
        std::fill(row.begin(), row.end(), 0);
        if (f < F) {
          const float* from = W + f * D;
          r.unit[f] = unit_of(from, D, r.norm[f]);
          const float per_unit = 1 / r.unit[f];
          float error = 0;
#pragma omp simd reduction(+ : error)
          for (int64_t d = 0; d < D; d++) {
            const float q = std::nearbyintf(from[d] * per_unit);
            const float left = from[d] - q * r.unit[f];
            error += left * left;
            row[d] = (int16_t)(int32_t)q;
          }
          r.error[f] = std::sqrt(error) * 1.001f;
        }
        const int32_t* pairs = (const int32_t*)row.data();
        for (int64_t p = 0; p < width / 2; p++) to[p * LANES + l] = pairs[p];
      }
    }
  });
  return r;
}

// ------------------------------------------------------------------------------------------------
// candidates

struct Candidate {
  float upper;
  int32_t latent;
};

struct Candidates {
  int64_t capacity, n = 0;
  std::unique_ptr<Candidate[]> list;
  float threshold;  // none with an upper end below it was kept

  Candidates(int64_t capacity_, float threshold_)
      : capacity(capacity_), list(new Candidate[capacity_]), threshold(threshold_) {}

  void make_room() {  // for one more tile
    if (n + LANES <= capacity) return;
    std::unique_ptr<Candidate[]> larger(new Candidate[capacity *= 2]);
    std::copy(list.get(), list.get() + n, larger.get());
    list = std::move(larger);
  }
};

struct Encoder {
  int64_t B, D, F, width, k = 1;
  bool absolute = false;
  float usual = 0;  // bias
  const float *x, *W, *b;
  Rounded tokens, latents;
  std::vector<float> upper_bias;  // b + what adding it can change; NaN, which no comparison accepts, in the padding
  std::vector<float> slack;       // (F,) of the bias
  std::vector<float> reach;       // (B,) per |w|, how far the true product can be from the rounded one
  int64_t* indices = nullptr;
  float* values = nullptr;

  // bias: what thresholds are compared with the product plus, b or b less a floor
  Encoder(const Tensor& x_, const Tensor& W_, const Tensor& b_, const float* bias)
      : B(x_.size(0)), D(x_.size(1)), F(W_.size(0)), width((x_.size(1) + 1) / 2 * 2) {
    TORCH_CHECK(x_.is_contiguous() && W_.is_contiguous() && b_.is_contiguous() && W_.size(1) == D && b_.numel() == F);
    x = x_.const_data_ptr<float>(), W = W_.const_data_ptr<float>(), b = b_.const_data_ptr<float>();
    tokens = round_tokens(x, B, D, width);
    latents = round_latents(W, F, D, width);
    upper_bias.assign(latents.norm.size(), std::numeric_limits<float>::quiet_NaN());
    slack.assign(latents.norm.size(), 0.f);
    float worst = 0;  // relative rounding error of a latent
    for (int64_t j = 0; j < F; j++) {
      slack[j] = std::max(std::fabs(bias[j]), std::fabs(b[j])) * 0x1p-21f;
      upper_bias[j] = bias[j] + slack[j];
      if (latents.norm[j] > 0) worst = std::max(worst, latents.error[j] / latents.norm[j]);
    }
    reach.resize(B);
    for (int64_t i = 0; i < B; i++) {  // 2^-20: what float32 itself can lose on the way
      const float n = tokens.norm[i], error = tokens.error[i];
      reach[i] = error + (n + error) * worst + n * 0x1p-20f;
    }
  }

  float bound(int64_t i, int64_t j) const { return latents.norm[j] * reach[i] + slack[j]; }

  // u[l] = upper end of latent l for token i; returns the latents whose upper end reaches the threshold, as bits
  uint32_t uppers(const int32_t* sums, int64_t i, int64_t t, float threshold, float* u) const {
    const float unit = tokens.unit[i], far = reach[i];
    const float *per = &latents.unit[t * LANES], *norm = &latents.norm[t * LANES], *bias = &upper_bias[t * LANES];
    if (absolute) {
      const float* add = &slack[t * LANES];  // is in bias already: less and more of it here, for either sign
      for (int64_t l = 0; l < LANES; l++)
        u[l] = std::fabs((float)sums[l] * per[l] * unit + (bias[l] - add[l])) + (norm[l] * far + add[l]);
    } else {
      for (int64_t l = 0; l < LANES; l++) u[l] = (float)sums[l] * per[l] * unit + (bias[l] + norm[l] * far);
    }
    uint32_t bits = 0;
#if defined(__AVX512BW__)
    const __m512 least = _mm512_set1_ps(threshold);
    bits = _mm512_cmp_ps_mask(_mm512_loadu_ps(u), least, _CMP_GE_OQ) |
           (uint32_t)_mm512_cmp_ps_mask(_mm512_loadu_ps(u + 16), least, _CMP_GE_OQ) << 16;
#elif defined(__AVX2__)
    const __m256 least = _mm256_set1_ps(threshold);
    for (int q = 0; q < 4; q++)
      bits |= (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(u + 8 * q), least, _CMP_GE_OQ)) << (8 * q);
#else
    for (int64_t l = 0; l < LANES; l++) bits |= (uint32_t)(u[l] >= threshold) << l;
#endif
    return bits;
  }

  // The k-th best lower end among token i's candidates (there are at least k), by halving: to count is quicker than to sort.
  float kth_lower(const Candidates& c, int64_t i, std::vector<float>& lower) const {
    lower.resize(c.n);
    float least = FLT_MAX, most = -FLT_MAX;
    for (int64_t p = 0; p < c.n; p++) {
      lower[p] = c.list[p].upper - 2 * bound(i, c.list[p].latent);
      least = std::min(least, lower[p]), most = std::max(most, lower[p]);
    }
    for (int64_t n = c.n; n != k;) {
      const float middle = least + 0.5f * (most - least);
      if (!(least < middle && middle < most)) break;
      n = 0;
      for (int64_t p = 0; p < c.n; p++) n += lower[p] >= middle;
      (n >= k ? least : most) = middle;
    }
    for (int64_t p = 0; p < c.n; p++) most = lower[p] >= least ? std::min(most, lower[p]) : most;
    return most;
  }

  void tighten(Candidates& c, int64_t i, std::vector<float>& scratch) const {
    c.threshold = std::max(c.threshold, kth_lower(c, i, scratch));
    int64_t n = 0;
    for (int64_t p = 0; p < c.n; p++)
      if (c.list[p].upper >= c.threshold) c.list[n++] = c.list[p];
    c.n = n;
  }

  // The exact value of token i's pre-activation at each latent of a list.
  void rescore(int64_t i, std::vector<std::pair<float, int32_t>>& list) const {
    dot_rows(
        x + i * D, 0, list.size(), D, [&](int64_t p) { return W + list[p].second * D; },
        [&](int64_t p, float dot) { list[p].first = dot + b[list[p].second]; });
  }

  // The exact k best of the candidates; false if they may not hold them.
  bool finish(const Candidates& c, int64_t i, std::vector<float>& scratch, std::vector<std::pair<float, int32_t>>& best) const {
    if (c.n < k) return false;
    const float least = kth_lower(c, i, scratch);
    if (!(least >= c.threshold)) return false;
    best.clear();
    for (int64_t p = 0; p < c.n; p++)
      if (c.list[p].upper >= least) best.emplace_back(0.f, c.list[p].latent);
    rescore(i, best);
    const bool abs = absolute;
    if ((int64_t)best.size() > k) std::nth_element(best.begin(), best.begin() + (k - 1), best.end(), [abs](const auto& p, const auto& q) {
      const float a = abs ? std::fabs(p.first) : p.first, c = abs ? std::fabs(q.first) : q.first;
      return a != c ? a > c : p.second < q.second;
    });
    for (int64_t s = 0; s < k; s++) {
      values[i * k + s] = best[s].first;
      indices[i * k + s] = best[s].second;
    }
    return true;
  }

  // Takes tokens through all latents; a list keeps the latents whose upper end reaches its threshold, which rises where
  // only k are wanted.
  void scan(const int64_t* rows, int64_t n, std::vector<Candidates>& lists, bool only_k) const {
    std::vector<float> scratch;
    alignas(64) int32_t sums[TOKENS * LANES];
    alignas(64) float u[LANES];
    const int16_t* x16[TOKENS];
    for (int64_t t = 0; t * LANES < F; t++) {
      const int16_t* w = latents.data + t * LANES * width;
      for (int64_t r0 = 0; r0 < n; r0 += TOKENS) {
        for (int64_t r = 0; r < TOKENS; r++) x16[r] = tokens.data + rows[std::min(r0 + r, n - 1)] * width;
        tile(x16, w, width / 2, sums);
        for (int64_t r = r0; r < std::min(r0 + TOKENS, n); r++) {
          Candidates& c = lists[r];
          uint32_t bits = uppers(sums + (r - r0) * LANES, rows[r], t, c.threshold, u);
          for (; bits; bits &= bits - 1) {
            const int l = __builtin_ctz(bits);
            c.list[c.n++] = {u[l], (int32_t)(t * LANES + l)};
          }
          if (c.n + LANES <= c.capacity) continue;
          if (only_k) tighten(c, rows[r], scratch);
          c.make_room();
        }
      }
    }
  }

  // The k best of some tokens. start: a token's first threshold, per unit of its norm, from `usual` on. failed: left
  // without proof.
  void panel(const int64_t* rows, int64_t n, float start, std::vector<int64_t>& failed) const {
    std::vector<Candidates> lists;
    for (int64_t r = 0; r < n; r++)
      lists.emplace_back(4 * k + 4 * LANES, start == -FLT_MAX ? start : usual + start * tokens.norm[rows[r]]);
    scan(rows, n, lists, true);
    std::vector<float> scratch;
    std::vector<std::pair<float, int32_t>> best;
    for (int64_t r = 0; r < n; r++)
      if (!finish(lists[r], rows[r], scratch, best)) failed.push_back(rows[r]);
  }

  // Tokens in panels, as many for every thread and all of a size, so that none has to wait for a last one.
  struct Panels {
    int64_t n, n_tiles, count;

    explicit Panels(int64_t n_) : n(n_), n_tiles((n_ + TOKENS - 1) / TOKENS) {
      const int64_t round = std::max(1, at::get_num_threads()) * (PANEL / TOKENS);  // tiles in a panel for each thread
      count = std::min(n_tiles, (n_tiles + round - 1) / round * std::max(1, at::get_num_threads()));
    }

    int64_t first(int64_t p) const { return std::min(n, p * n_tiles / count * TOKENS); }

    template <class Take>
    void each(const Take& take) const {
      by_blocks(count, 1, [&](int64_t p, int64_t) { take(p, first(p), first(p + 1) - first(p)); });
    }
  };

  // All of rows, in parallel; returns the tokens left without proof, in order.
  std::vector<int64_t> run(const std::vector<int64_t>& rows, float start) const {
    const Panels panels(rows.size());
    std::vector<std::vector<int64_t>> failed(panels.count);
    panels.each([&](int64_t p, int64_t from, int64_t n) { panel(&rows[from], n, start, failed[p]); });
    std::vector<int64_t> all;
    for (auto& f : failed) all.insert(all.end(), f.begin(), f.end());
    return all;
  }

  int64_t all_tokens() {
    std::vector<int64_t> pilot, rest;
    const int64_t every = std::max<int64_t>(1, B / PILOT);
    for (int64_t i = 0; i < B; i++) (i % every == 0 ? pilot : rest).push_back(i);
    for (int64_t i : run(pilot, -FLT_MAX)) give_up(i);
    float start = FLT_MAX;  // what the pilot's k-th latents had, per norm, and some room
    if (!absolute) usual = std::accumulate(b, b + F, 0.0) / F;
    for (int64_t i : pilot) {
      float least = FLT_MAX;
      for (int64_t s = 0; s < k; s++) least = std::min(least, absolute ? std::fabs(values[i * k + s]) : values[i * k + s]);
      if (tokens.norm[i] > 0) start = std::min(start, (least - usual) / tokens.norm[i]);
    }
    start = start < FLT_MAX ? start - 0.05f * std::fabs(start) : -FLT_MAX;
    const std::vector<int64_t> again = run(rest, start);
    for (int64_t i : run(again, -FLT_MAX)) give_up(i);
    return again.size();
  }

  void give_up(int64_t i) const {  // a token that is not finite: any k latents, with its own NaN
    for (int64_t s = 0; s < k; s++) {
      indices[i * k + s] = s;
      values[i * k + s] = dot(x + i * D, W + s * D, D) + b[s];
    }
  }
};

std::atomic<int64_t> n_encoded{0}, n_again{0};

// Tokens that encode_top_k has seen in this process, and those of them that took two attempts
std::tuple<int64_t, int64_t> looks() { return {n_encoded, n_again}; }

// x (B, D), W (F, D), b (F,) -> indices (B, k), values (B, k) = (x @ W^T + b) there, tokens that took two attempts
std::tuple<Tensor, Tensor, int64_t> encode_top_k(const Tensor& x, const Tensor& W, const Tensor& b, int64_t k, bool absolute) {
  TORCH_CHECK(k >= 1 && k <= W.size(0));
  Tensor indices = at::empty({x.size(0), k}, x.options().dtype(at::kLong)), values = at::empty({x.size(0), k}, x.options());
  if (x.size(0) == 0) return {indices, values, 0};
  Encoder e(x, W, b, b.const_data_ptr<float>());
  e.k = k, e.absolute = absolute;
  e.indices = indices.mutable_data_ptr<int64_t>(), e.values = values.mutable_data_ptr<float>();
  const int64_t again = e.all_tokens();
  n_encoded += x.size(0), n_again += again;
  return {indices, values, again};
}

// x (B, D), W (F, D), b (F,), floor (F,) -> the places where x @ W^T + b exceeds floor, token by token: latents (n,),
// values (n,), and where each token's begin (B,)
std::tuple<Tensor, Tensor, Tensor> encode_above(const Tensor& x, const Tensor& W, const Tensor& b, const Tensor& floor) {
  const int64_t B = x.size(0), D = x.size(1);
  TORCH_CHECK(floor.is_contiguous() && floor.numel() == b.numel());
  const Tensor over = at::sub(b, floor);
  const float* at_least = floor.const_data_ptr<float>();
  const Encoder e(x, W, b, over.const_data_ptr<float>());
  const Encoder::Panels panels(B);
  std::vector<std::vector<std::pair<int32_t, float>>> found(panels.count);
  Tensor offsets = at::zeros({B}, x.options().dtype(at::kLong));
  int64_t* counts = offsets.mutable_data_ptr<int64_t>();
  panels.each([&](int64_t p, int64_t first, int64_t n) {
    std::vector<int64_t> rows(n);
    std::iota(rows.begin(), rows.end(), first);
    std::vector<Candidates> lists;
    for (int64_t r = 0; r < n; r++) lists.emplace_back(8 * LANES, 0.f);
    e.scan(rows.data(), n, lists, false);
    for (int64_t r = 0; r < n; r++)
      for (int64_t c = 0; c < lists[r].n; c++) {
        const int32_t j = lists[r].list[c].latent;
        const float value = dot(e.x + (first + r) * D, e.W + j * D, D) + e.b[j];
        if (value > at_least[j]) found[p].emplace_back(j, value), counts[first + r]++;
      }
  });
  int64_t n = 0;
  for (int64_t i = 0; i < B; i++) {
    const int64_t count = counts[i];
    counts[i] = n;
    n += count;
  }
  Tensor indices = at::empty({n}, offsets.options()), values = at::empty({n}, x.options());
  int64_t* to = indices.mutable_data_ptr<int64_t>();
  float* v = values.mutable_data_ptr<float>();
  for (const auto& part : found)
    for (const auto& place : part) *to++ = place.first, *v++ = place.second;
  return {indices, values, offsets};
}

// ------------------------------------------------------------------------------------------------
// few tokens: what takes time is reading W. An 8-bit copy is a quarter of it to read; the proof is as above.

// W (F, D) -> integers (F, D), and of every row its unit, its norm, and the norm of what rounding changed (3, F)
std::tuple<Tensor, Tensor> pack(const Tensor& W) {
  const int64_t F = W.size(0), D = W.size(1);
  TORCH_CHECK(W.is_contiguous() && D <= 1 << 17);  // or sums would leave 32 bits
  Tensor rows = at::empty({F, D}, W.options().dtype(at::kChar)), about = at::empty({3, F}, W.options());
  const float* w = W.const_data_ptr<float>();
  int8_t* to = rows.mutable_data_ptr<int8_t>();
  float* of = about.mutable_data_ptr<float>();
  by_blocks(F, 512, [&](int64_t begin, int64_t end) {
    for (int64_t f = begin; f < end; f++) {
      const float *row = w + f * D, most = largest(row, D), unit = most > 0 ? most / 127.0f : 1.0f, per_unit = 1 / unit;
      float error = 0;
#pragma omp simd reduction(+ : error)
      for (int64_t d = 0; d < D; d++) {
        const float q = std::nearbyintf(row[d] * per_unit);
        const float left = row[d] - q * unit;
        error += left * left;
        to[f * D + d] = (int8_t)(int32_t)q;
      }
      of[f] = unit, of[F + f] = std::sqrt(dot(row, row, D)), of[2 * F + f] = std::sqrt(error) * 1.001f;
    }
  });
  return {rows, about};
}

// One row after the other: memory comes fastest as a single stream.
int32_t dot(const int16_t* x, const int8_t* w, int64_t D) {
  int64_t d = 0;
  int32_t sum = 0;
#if defined(__AVX512BW__)
  __m512i sums[4];
  for (__m512i& s : sums) s = _mm512_setzero_si512();
  const auto add = [&](__m512i& to, int64_t at) {
    to = multiply_add(to, _mm512_loadu_si512(x + at), _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)(w + at))));
  };
  for (; d + 128 <= D; d += 128)
    for (int64_t q = 0; q < 4; q++) add(sums[q], d + 32 * q);
  for (; d + 32 <= D; d += 32) add(sums[0], d);
  sum = _mm512_reduce_add_epi32(_mm512_add_epi32(_mm512_add_epi32(sums[0], sums[1]), _mm512_add_epi32(sums[2], sums[3])));
#endif
  for (; d < D; d++) sum += x[d] * w[d];
  return sum;
}

struct Screen {  // of all products x @ W^T + b: about what they are, and how far off that can be
  int64_t B, D, F;
  const float *x, *W, *b;
  std::vector<float> about, bound;  // (B, F)

  Screen(const Tensor& x_, const Tensor& W_, const Tensor& b_, const Tensor& rows, const Tensor& of_rows)
      : B(x_.size(0)), D(x_.size(1)), F(W_.size(0)), about(B * F), bound(B * F) {
    for (const Tensor& t : {x_, W_, b_, rows, of_rows}) TORCH_CHECK(t.is_contiguous());
    TORCH_CHECK(W_.size(1) == D && b_.numel() == F && rows.sizes() == W_.sizes() && of_rows.numel() == 3 * F);
    x = x_.const_data_ptr<float>(), W = W_.const_data_ptr<float>(), b = b_.const_data_ptr<float>();
    const Rounded tokens = round_tokens(x, B, D, D);
    const int8_t* w = rows.const_data_ptr<int8_t>();
    const float *unit = of_rows.const_data_ptr<float>(), *norm = unit + F, *error = unit + 2 * F;
    by_blocks(F, 256, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; j++)
        for (int64_t i = 0; i < B; i++) {
          const float size = tokens.norm[i] + tokens.error[i], off = tokens.error[i] + size * 0x1p-20f;
          about[i * F + j] = (float)dot(tokens.data + i * D, w + j * D, D) * unit[j] * tokens.unit[i] + b[j];
          bound[i * F + j] = norm[j] * off + size * error[j] + std::fabs(b[j]) * 0x1p-21f;
        }
    });
  }

  float exact(int64_t i, int64_t j) const { return dot(x + i * D, W + j * D, D) + b[j]; }
};

// x (B, D), W (F, D), b (F,), W packed -> indices (B, k), values (B, k) = (x @ W^T + b) there
std::tuple<Tensor, Tensor> packed_top_k(
    const Tensor& x, const Tensor& W, const Tensor& b, const Tensor& rows, const Tensor& of_rows, int64_t k, bool absolute) {
  const Screen s(x, W, b, rows, of_rows);
  TORCH_CHECK(k >= 1 && k <= s.F);
  Tensor indices = at::empty({s.B, k}, x.options().dtype(at::kLong)), values = at::empty({s.B, k}, x.options());
  // The k-th largest of groups' largest lower ends: as many latents reach it, so the k best all do.
  const int64_t group = std::max<int64_t>(1, std::min<int64_t>(16, s.F / (2 * k))), n_groups = (s.F + group - 1) / group;
  std::vector<float> tops(n_groups);
  std::vector<std::pair<float, int64_t>> best;
  for (int64_t i = 0; i < s.B; i++) {
    const float *about = &s.about[i * s.F], *bound = &s.bound[i * s.F];
    const auto size = [&](float v) { return absolute ? std::fabs(v) : v; };
    for (int64_t g = 0; g < n_groups; g++) {
      float top = -FLT_MAX;
      for (int64_t j = g * group; j < std::min(s.F, (g + 1) * group); j++) top = std::max(top, size(about[j]) - bound[j]);
      tops[g] = top;
    }
    std::nth_element(tops.begin(), tops.begin() + (k - 1), tops.end(), std::greater<float>());
    best.clear();
    for (int64_t j = 0; j < s.F; j++)
      if (size(about[j]) + bound[j] >= tops[k - 1]) best.emplace_back(s.exact(i, j), j);
    for (int64_t j = 0; (int64_t)best.size() < k; j++) best.emplace_back(s.exact(i, j), j);  // x is not finite: any k
    std::nth_element(best.begin(), best.begin() + (k - 1), best.end(), [&](const auto& p, const auto& q) {
      return size(p.first) != size(q.first) ? size(p.first) > size(q.first) : p.second < q.second;
    });
    for (int64_t p = 0; p < k; p++) {
      values.mutable_data_ptr<float>()[i * k + p] = best[p].first;
      indices.mutable_data_ptr<int64_t>()[i * k + p] = best[p].second;
    }
  }
  return {indices, values};
}

// The same for the places where x @ W^T + b exceeds floor (F,): latents (n,), values (n,), where each token's begin (B,)
std::tuple<Tensor, Tensor, Tensor> packed_above(
    const Tensor& x, const Tensor& W, const Tensor& b, const Tensor& rows, const Tensor& of_rows, const Tensor& floor) {
  const Screen s(x, W, b, rows, of_rows);
  TORCH_CHECK(floor.is_contiguous() && floor.numel() == s.F);
  const float* least = floor.const_data_ptr<float>();
  std::vector<int64_t> found, starts;
  std::vector<float> exact;
  for (int64_t i = 0; i < s.B; i++) {
    starts.push_back(found.size());
    for (int64_t j = 0; j < s.F; j++) {
      if (!(s.about[i * s.F + j] + s.bound[i * s.F + j] >= least[j])) continue;
      const float value = s.exact(i, j);
      if (value > least[j]) found.push_back(j), exact.push_back(value);
    }
  }
  const auto longs = x.options().dtype(at::kLong);
  Tensor indices = at::empty({(int64_t)found.size()}, longs), offsets = at::empty({s.B}, longs);
  Tensor values = at::empty({(int64_t)found.size()}, x.options());
  std::copy(found.begin(), found.end(), indices.mutable_data_ptr<int64_t>());
  std::copy(starts.begin(), starts.end(), offsets.mutable_data_ptr<int64_t>());
  std::copy(exact.begin(), exact.end(), values.mutable_data_ptr<float>());
  return {indices, values, offsets};
}

// ------------------------------------------------------------------------------------------------
// sparse products

// Where each token's places lie: of (B, K) indices K each, of flat ones those from offsets (B,) on
struct Places {
  int64_t n, B, K;
  const int64_t *at, *starts;

  Places(const Tensor& indices, const c10::optional<Tensor>& offsets, int64_t F)
      : n(indices.numel()), B(offsets ? offsets->numel() : indices.size(0)), K(offsets ? 0 : indices.size(1)),
        at(indices.const_data_ptr<int64_t>()), starts(offsets ? offsets->const_data_ptr<int64_t>() : nullptr) {
    TORCH_CHECK(indices.is_contiguous() && (!offsets || offsets->is_contiguous()));
    bool fit = true;
    for (int64_t p = 0; p < n; p++) fit &= (uint64_t)at[p] < (uint64_t)F;
    for (int64_t i = 0; starts && i < B; i++) fit &= 0 <= starts[i] && starts[i] <= end(i) && end(i) <= n;
    TORCH_CHECK(fit, "indices or offsets lie outside");
  }

  int64_t begin(int64_t i) const { return starts ? starts[i] : i * K; }
  int64_t end(int64_t i) const { return !starts ? (i + 1) * K : i + 1 < B ? starts[i + 1] : n; }
};

// The places of each latent, in the order of tokens
struct ByLatent {
  struct Place {
    int32_t token, place;
    float value;
  };
  std::vector<int32_t> starts;  // (F + 1,)
  std::vector<Place> sorted;

  ByLatent(const Places& places, const float* values, int64_t F, bool zeros_too) : starts(F + 1, 0) {
    const int64_t n_parts = std::min(8, at::get_num_threads()), size = (places.B + n_parts - 1) / n_parts;
    std::vector<std::vector<int32_t>> next(n_parts, std::vector<int32_t>(F, 0));  // where a latent's next place goes
    const auto each = [&](const auto& take) {  // take(next of this part of the tokens, token, place)
      by_blocks(n_parts, 1, [&](int64_t part, int64_t) {
        for (int64_t i = part * size; i < std::min(places.B, (part + 1) * size); i++)
          for (int64_t p = places.begin(i); p < places.end(i); p++)
            if (zeros_too || values[p] != 0) take(next[part], i, p);
      });
    };
    each([&](auto& counts, int64_t, int64_t p) { counts[places.at[p]]++; });
    for (int64_t f = 0; f < F; f++) {
      starts[f + 1] = starts[f];
      for (auto& counts : next) starts[f + 1] += std::exchange(counts[f], starts[f + 1]);
    }
    sorted.resize(starts[F]);
    each([&](auto& to, int64_t i, int64_t p) { sorted[to[places.at[p]]++] = {(int32_t)i, (int32_t)p, values[p]}; });
  }
};

// (F, D): for each latent the sum of values[place] * x[token] over the places whose index is that latent
Tensor sum_by_latent(
    const Tensor& indices, const c10::optional<Tensor>& offsets, const Tensor& values, const Tensor& x, int64_t F) {
  const Places places(indices, offsets, F);
  const int64_t D = x.size(1);
  TORCH_CHECK(values.is_contiguous() && x.is_contiguous() && values.numel() == places.n && x.size(0) == places.B);
  const ByLatent by(places, values.const_data_ptr<float>(), F, false);
  const float* rows = x.const_data_ptr<float>();
  Tensor out = at::empty({F, D}, x.options());
  float* to = out.mutable_data_ptr<float>();
  by_blocks(F, 128, [&](int64_t begin, int64_t end) {
    for (int64_t f = begin; f < end; f++)
      sum_rows(
          to + f * D, nullptr, by.starts[f], by.starts[f + 1], D, [&](int64_t p) { return rows + by.sorted[p].token * D; },
          [&](int64_t p) { return by.sorted[p].value; });
  });
  return out;
}

// The two gradients of a bag without its bias, of grad (B, D): that of values, dot_at(grad, W), and that of W (F, D),
// sum_by_latent(values, grad), from one reading of grad's rows
std::tuple<Tensor, Tensor> bag_backward(
    const Tensor& indices, const c10::optional<Tensor>& offsets, const Tensor& values, const Tensor& grad, const Tensor& W) {
  const int64_t F = W.size(0), D = W.size(1);
  const Places places(indices, offsets, F);
  TORCH_CHECK(values.is_contiguous() && grad.is_contiguous() && W.is_contiguous() && grad.size(1) == D);
  TORCH_CHECK(values.numel() == places.n && grad.size(0) == places.B);
  const ByLatent by(places, values.const_data_ptr<float>(), F, true);
  const float *rows = grad.const_data_ptr<float>(), *w = W.const_data_ptr<float>();
  Tensor of_values = at::empty(indices.sizes(), grad.options()), of_W = at::empty({F, D}, grad.options());
  float *dots = of_values.mutable_data_ptr<float>(), *to = of_W.mutable_data_ptr<float>();
  by_blocks(F, 128, [&](int64_t begin, int64_t end) {
    for (int64_t f = begin; f < end; f++)
      each_row<true, true>(
          by.starts[f], by.starts[f + 1], D, [&](int64_t p) { return rows + by.sorted[p].token * D; },
          [&](int64_t p) { return by.sorted[p].value; }, nullptr, to + f * D, w + f * D,
          [&](int64_t p, float dot) { dots[by.sorted[p].place] = dot; });
  });
  return {of_values, of_W};
}

// Like indices: left[token] . right[indices[place]]
Tensor dot_at(const Tensor& indices, const c10::optional<Tensor>& offsets, const Tensor& left, const Tensor& right) {
  const Places places(indices, offsets, right.size(0));
  const int64_t D = left.size(1);
  TORCH_CHECK(left.is_contiguous() && right.is_contiguous() && right.size(1) == D && left.size(0) == places.B);
  Tensor out = at::empty(indices.sizes(), left.options());
  const float *a = left.const_data_ptr<float>(), *rows = right.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  by_blocks(places.B, 128, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      dot_rows(
          a + i * D, places.begin(i), places.end(i), D, [&](int64_t p) { return rows + places.at[p] * D; },
          [&](int64_t p, float dot) { to[p] = dot; });
  });
  return out;
}

// (B, D): for each token the sum of values[place] * W[indices[place]] over its places, plus bias (D,) if there is one
Tensor bag(
    const Tensor& indices, const c10::optional<Tensor>& offsets, const Tensor& values, const Tensor& W,
    const c10::optional<Tensor>& bias) {
  const Places places(indices, offsets, W.size(0));
  const int64_t D = W.size(1);
  TORCH_CHECK(values.is_contiguous() && W.is_contiguous() && values.numel() == places.n);
  TORCH_CHECK(!bias || (bias->is_contiguous() && bias->numel() == D));
  const float *v = values.const_data_ptr<float>(), *w = W.const_data_ptr<float>();
  const float* first = bias ? bias->const_data_ptr<float>() : nullptr;
  Tensor out = at::empty({places.B, D}, W.options());
  float* to = out.mutable_data_ptr<float>();
  by_blocks(places.B, 128, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      sum_rows(
          to + i * D, first, places.begin(i), places.end(i), D, [&](int64_t p) { return w + places.at[p] * D; },
          [&](int64_t p) { return v[p]; });
  });
  return out;
}

// How many of each token's values are not 0 (B,), and how often each latent's are (F,)
std::tuple<Tensor, Tensor> activity(
    const Tensor& indices, const c10::optional<Tensor>& offsets, const Tensor& values, int64_t F) {
  const Places places(indices, offsets, F);
  TORCH_CHECK(values.is_contiguous() && values.numel() == places.n);
  Tensor l0 = at::zeros({places.B}, indices.options()), fired = at::zeros({F}, indices.options());
  int64_t *per_token = l0.mutable_data_ptr<int64_t>(), *per_latent = fired.mutable_data_ptr<int64_t>();
  const float* v = values.const_data_ptr<float>();
  for (int64_t i = 0; i < places.B; i++)
    for (int64_t p = places.begin(i); p < places.end(i); p++)
      if (v[p] != 0) per_token[i]++, per_latent[places.at[p]]++;
  return {l0, fired};
}

// Per token |x|^2, |y|^2, x.y and |x - y|^2 (4, B), and the sum of x over tokens (D,), all in float64
std::tuple<Tensor, Tensor> moments(const Tensor& x, const Tensor& y) {
  const int64_t B = x.size(0), D = x.size(1);
  TORCH_CHECK(x.is_contiguous() && y.is_contiguous() && x.sizes() == y.sizes());
  const auto options = x.options().dtype(at::kDouble);
  Tensor rows = at::empty({4, B}, options), columns = at::zeros({D}, options);
  const float *a = x.const_data_ptr<float>(), *b = y.const_data_ptr<float>();
  double *out = rows.mutable_data_ptr<double>(), *sums = columns.mutable_data_ptr<double>();
  const int64_t n_parts = std::max(1, at::get_num_threads()), size = (B + n_parts - 1) / n_parts;
  std::vector<double> partial(n_parts * D);
  by_blocks(n_parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; part++) {
      double* column = &partial[part * D];
      for (int64_t i = part * size; i < std::min(B, (part + 1) * size); i++) {
        const float *p = a + i * D, *q = b + i * D;
        double x2 = 0, y2 = 0, xy = 0, e2 = 0;
#pragma omp simd reduction(+ : x2, y2, xy, e2)
        for (int64_t d = 0; d < D; d++) {
          const double u = p[d], v = q[d];
          column[d] += u, x2 += u * u, y2 += v * v, xy += u * v, e2 += (u - v) * (u - v);
        }
        out[i] = x2, out[B + i] = y2, out[2 * B + i] = xy, out[3 * B + i] = e2;
      }
    }
  });
  for (int64_t part = 0; part < n_parts; part++)
    for (int64_t d = 0; d < D; d++) sums[d] += partial[part * D + d];
  return {rows, columns};
}

// In place: the part of every row of grad (F, D) along the same row of W is dropped
void project_rows_(Tensor grad, const Tensor& W) {
  const int64_t F = W.size(0), D = W.size(1);
  TORCH_CHECK(grad.is_contiguous() && W.is_contiguous() && grad.sizes() == W.sizes());
  float* g = grad.mutable_data_ptr<float>();
  const float* w = W.const_data_ptr<float>();
  by_blocks(F, 512, [&](int64_t begin, int64_t end) {
    for (int64_t f = begin; f < end; f++) {
      const float *row = w + f * D, length = dot(row, row, D);
      add_scaled(g + f * D, row, -dot(g + f * D, row, D) / std::max(length, 1e-24f), D);
    }
  });
}

// In place: every row of W (F, D) gets unit norm; returns the factors (F, 1) that took
Tensor unit_rows_(Tensor W) {
  const int64_t F = W.size(0), D = W.size(1);
  TORCH_CHECK(W.is_contiguous());
  Tensor factors = at::empty({F, 1}, W.options());
  float *w = W.mutable_data_ptr<float>(), *by = factors.mutable_data_ptr<float>();
  by_blocks(F, 512, [&](int64_t begin, int64_t end) {
    for (int64_t f = begin; f < end; f++) {
      float* row = w + f * D;
      by[f] = 1 / std::max(std::sqrt(dot(row, row, D)), 1e-12f);
      for (int64_t d = 0; d < D; d++) row[d] *= by[f];
    }
  });
  return factors;
}

// Sum of squares of grad; with rows W, of what is left of grad's rows (F, D) without their part along W's
double squares(const Tensor& grad, const c10::optional<Tensor>& W) {
  TORCH_CHECK(grad.is_non_overlapping_and_dense());
  TORCH_CHECK(!W || (grad.is_contiguous() && W->is_contiguous() && grad.sizes() == W->sizes() && grad.dim() == 2));
  const int64_t D = W ? W->size(1) : 1 << 12, n = grad.numel(), n_rows = (n + D - 1) / D;
  const float *g = grad.const_data_ptr<float>(), *w = W ? W->const_data_ptr<float>() : nullptr;
  std::vector<double> sums(n_rows);
  by_blocks(n_rows, 256, [&](int64_t begin, int64_t end) {
    for (int64_t f = begin; f < end; f++) {
      const float *row = g + f * D, *along = w + f * D;
      const int64_t length = std::min(D, n - f * D);
      sums[f] = dot(row, row, length);
      if (!w) continue;
      const double part = dot(row, along, D), norm = dot(along, along, D);
      sums[f] = std::max(0.0, sums[f] - part * part / std::max(norm, 1e-24));
    }
  });
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

// Adam's moments, in float32, or in bfloat16 rounded up or down at random in proportion to what is near: a small change
// of a large number then still counts, on average, where rounding to the nearest would lose it every time.
struct Exact {
  float* data;
  float get(int64_t i) const { return data[i]; }
  void set(int64_t i, float value, uint32_t) const { data[i] = value; }
};

struct Half {
  uint16_t* data;
  float get(int64_t i) const {
    const uint32_t bits = (uint32_t)data[i] << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  void set(int64_t i, float value, uint32_t random) const {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    data[i] = (uint16_t)((bits + (random & 0xFFFF)) >> 16);
  }
};

inline uint32_t scramble(uint32_t x) {  // of a counter
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

struct Adam {
  float rate, b1, b2, c1, c2, per_root, eps, scale;
  uint32_t seed;

  template <class Moment>
  void step(float* w, const float* g, Moment m, Moment v, int64_t from, int64_t n, const float* along, float by) const {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
      const float grad = scale * (g[i] - by * along[i]);
      const uint32_t random = scramble(seed + (uint32_t)(from + i));
      const float first = b1 * m.get(from + i) + c1 * grad, second = b2 * v.get(from + i) + c2 * grad * grad;
      m.set(from + i, first, random);
      v.set(from + i, second, random >> 16);
      w[i] -= rate * first / (std::sqrt(second) * per_root + eps);
    }
  }

  template <class Moment>
  void run(Tensor& p, const Tensor& grad, Moment m, Moment v, bool unit_rows) const {
    float* w = p.mutable_data_ptr<float>();
    const float* g = grad.const_data_ptr<float>();
    if (!unit_rows) {
      by_blocks(p.numel(), 1 << 18, [&](int64_t begin, int64_t end) {
        step(w + begin, g + begin, m, v, begin, end - begin, g + begin, 0.f);
      }, 1 << 14);
      return;
    }
    const int64_t D = p.size(1);
    by_blocks(p.size(0), 512, [&](int64_t begin, int64_t end) {
      for (int64_t f = begin; f < end; f++) {
        float* row = w + f * D;
        const float by = dot(g + f * D, row, D) / std::max(dot(row, row, D), 1e-24f);
        step(row, g + f * D, m, v, f * D, D, row, by);
        const float unit = 1 / std::max(std::sqrt(dot(row, row, D)), 1e-12f);
        for (int64_t d = 0; d < D; d++) row[d] *= unit;
      }
    });
  }
};

// In place, Adam (Kingma & Ba 2015, algorithm 1) on numbers that lie alike in all four tensors, with the gradient times
// scale. step counts from 1. unit_rows: p's rows (F, D) move on the sphere: the gradient's part along a row is dropped
// first, and the row gets unit norm after.
void adam_(
    Tensor p, const Tensor& grad, Tensor m, Tensor v, int64_t step, double lr, double beta1, double beta2, double eps,
    double scale, bool unit_rows) {
  for (const Tensor& t : {grad, m, v})
    TORCH_CHECK(t.strides() == p.strides() && t.sizes() == p.sizes() && t.is_non_overlapping_and_dense());
  TORCH_CHECK(!unit_rows || (p.is_contiguous() && p.dim() == 2));
  const Adam adam{
      (float)(lr / (1 - std::pow(beta1, step))), (float)beta1, (float)beta2, (float)(1 - beta1), (float)(1 - beta2),
      (float)(1 / std::sqrt(1 - std::pow(beta2, step))), (float)eps, (float)scale, (uint32_t)step * 0x9E3779B9u};
  if (m.scalar_type() == at::kBFloat16) {
    const auto bits = [](Tensor& t) { return Half{(uint16_t*)t.mutable_data_ptr<at::BFloat16>()}; };
    adam.run(p, grad, bits(m), bits(v), unit_rows);
  } else {
    adam.run(p, grad, Exact{m.mutable_data_ptr<float>()}, Exact{v.mutable_data_ptr<float>()}, unit_rows);
  }
}

}  // namespace

TORCH_LIBRARY(nanosae, m) {
#if defined(__AVX512BW__) || defined(__AVX2__)  // elsewhere torch's float32 product is quicker
  m.def("encode_top_k(Tensor x, Tensor W, Tensor b, int k, bool absolute) -> (Tensor, Tensor, int)");
  m.def("looks() -> (int, int)", looks);
  m.def("encode_above(Tensor x, Tensor W, Tensor b, Tensor floor) -> (Tensor, Tensor, Tensor)");
#endif
  m.def("pack(Tensor W) -> (Tensor, Tensor)");
  m.def("packed_top_k(Tensor x, Tensor W, Tensor b, Tensor rows, Tensor of_rows, int k, bool absolute) -> (Tensor, Tensor)");
  m.def("packed_above(Tensor x, Tensor W, Tensor b, Tensor rows, Tensor of_rows, Tensor floor) -> (Tensor, Tensor, Tensor)");
  m.def("sum_by_latent(Tensor indices, Tensor? offsets, Tensor values, Tensor x, int n_latents) -> Tensor");
  m.def("bag(Tensor indices, Tensor? offsets, Tensor values, Tensor W, Tensor? bias) -> Tensor");
  m.def(
      "bag_backward(Tensor indices, Tensor? offsets, Tensor values, Tensor grad, Tensor W) -> (Tensor, Tensor)");
  m.def("activity(Tensor indices, Tensor? offsets, Tensor values, int n_latents) -> (Tensor, Tensor)");
  m.def("dot_at(Tensor indices, Tensor? offsets, Tensor left, Tensor right) -> Tensor");
  m.def("moments(Tensor x, Tensor y) -> (Tensor, Tensor)");
  m.def(
      "adam_(Tensor(a!) p, Tensor grad, Tensor(b!) m, Tensor(c!) v, int step, float lr, float beta1, float beta2, "
      "float eps, float scale, bool unit_rows) -> ()");
  m.def("squares(Tensor grad, Tensor? W) -> float");
  m.def("project_rows_(Tensor(a!) grad, Tensor W) -> ()");
  m.def("unit_rows_(Tensor(a!) W) -> Tensor");
}

TORCH_LIBRARY_IMPL(nanosae, CPU, m) {
#if defined(__AVX512BW__) || defined(__AVX2__)
  m.impl("encode_top_k", encode_top_k);
  m.impl("encode_above", encode_above);
#endif
  m.impl("pack", pack);
  m.impl("packed_top_k", packed_top_k);
  m.impl("packed_above", packed_above);
  m.impl("sum_by_latent", sum_by_latent);
  m.impl("bag", bag);
  m.impl("bag_backward", bag_backward);
  m.impl("activity", activity);
  m.impl("dot_at", dot_at);
  m.impl("moments", moments);
  m.impl("adam_", adam_);
  m.impl("squares", squares);
  m.impl("project_rows_", project_rows_);
  m.impl("unit_rows_", unit_rows_);
}
