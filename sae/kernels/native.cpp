// Selection and sparse operations for CPUs, compiled on first use (native.py). sparse.py, selection.py and adam.py have
// their plain twins and call them.
//
// Letters: B tokens in a batch, D width, F latents, K kept latents.
//
// encode_top_k finds the K largest of x @ W^T + b per token without writing the (B, F) matrix. Tokens and latents are
// rounded to integers of 8 or 16 bits, whose products run at four or two times the speed of float32's. The error of
// rounding has a bound, by Cauchy-Schwarz: |x.w - x'.w'| <= |x - x'| |w| + |x'| |w - w'|. So every product becomes an
// interval. The K likeliest latents are computed again in float32; others whose upper end is below the least of these
// cannot be among the K best, and the few left are computed again, too. A token whose candidates do not prove this is
// encoded again from a threshold of minus infinity.

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
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__AVX512BW__) || defined(__AVX2__)
#include <immintrin.h>
#endif

using at::Tensor;

namespace {

constexpr int64_t LANES = 32;   // latents in a tile
constexpr int64_t PANEL = 252;  // tokens that a thread multiplies with all latents at a time
constexpr float PART = 0.25f;   // of the largest possible error: products are hardly ever further off
constexpr int64_t PILOT = 28;   // tokens encoded first, to find where thresholds of the others can start

// f(begin, end) for all blocks of [0, n), of `least` to `most` items. Each thread takes the next block left, since some
// are more work than others, and other programs may use a core for a while.
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
// integer products: out[r][lane] = start[lane] + sum over d of x[r][d] * w[lane][d], w laid out [D/GROUP][LANES][GROUP]

#if defined(__AVX512VNNI__)  // one instruction adds four products of 8 bits, unsigned by signed
typedef uint8_t TokenInteger;
typedef int8_t LatentInteger;
constexpr int32_t OFFSET = 128;  // added to a token's integers
#else
typedef int16_t TokenInteger, LatentInteger;
constexpr int32_t OFFSET = 0;
#endif
constexpr int64_t GROUP = 4 / sizeof(LatentInteger);  // products that a lane adds at a time

#if defined(__AVX512BW__)

constexpr int TOKENS = 14;

inline __m512i add_pairs(__m512i sum, __m512i a, __m512i b) {  // of 16-bit integers
#if defined(__AVX512VNNI__)
  return _mm512_dpwssd_epi32(sum, a, b);
#else
  return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
#endif
}

inline __m512i add_groups(__m512i sum, __m512i x, __m512i w) {
#if defined(__AVX512VNNI__)
  return _mm512_dpbusd_epi32(sum, x, w);
#else
  return add_pairs(sum, x, w);
#endif
}

void tile(const TokenInteger* const* x, const LatentInteger* w, int64_t n_groups, const int32_t* start, int32_t* out) {
  __m512i low[TOKENS], high[TOKENS];
#pragma GCC unroll 14  // every index a constant, or sums would live in memory
  for (int r = 0; r < TOKENS; r++) low[r] = _mm512_loadu_si512(start), high[r] = _mm512_loadu_si512(start + 16);
  for (int64_t g = 0; g < n_groups; g++, w += GROUP * LANES) {
    const __m512i w0 = _mm512_load_si512(w), w1 = _mm512_load_si512(w + GROUP * LANES / 2);
#pragma GCC unroll 14
    for (int r = 0; r < TOKENS; r++) {
      int32_t group;
      std::memcpy(&group, x[r] + GROUP * g, 4);
      const __m512i all = _mm512_set1_epi32(group);
      low[r] = add_groups(low[r], all, w0);
      high[r] = add_groups(high[r], all, w1);
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

void tile(const TokenInteger* const* x, const LatentInteger* w, int64_t n_groups, const int32_t* start, int32_t* out) {
  for (int64_t half = 0; half < 2; half++) {
    const __m256i *first = (const __m256i*)(start + 16 * half), *at = (const __m256i*)(w + half * LANES);
    __m256i low[TOKENS], high[TOKENS];
#pragma GCC unroll 6  // every index a constant, or sums would live in memory
    for (int r = 0; r < TOKENS; r++) low[r] = _mm256_loadu_si256(first), high[r] = _mm256_loadu_si256(first + 1);
    for (int64_t g = 0; g < n_groups; g++, at += 4) {
      const __m256i w0 = _mm256_load_si256(at), w1 = _mm256_load_si256(at + 1);
#pragma GCC unroll 6
      for (int r = 0; r < TOKENS; r++) {
        int32_t group;
        std::memcpy(&group, x[r] + GROUP * g, 4);
        const __m256i all = _mm256_set1_epi32(group);
        low[r] = _mm256_add_epi32(low[r], _mm256_madd_epi16(all, w0));
        high[r] = _mm256_add_epi32(high[r], _mm256_madd_epi16(all, w1));
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

void tile(const TokenInteger* const* x, const LatentInteger* w, int64_t n_groups, const int32_t* start, int32_t* out) {
  for (int r = 0; r < TOKENS; r++) std::copy(start, start + LANES, out + LANES * r);
  for (int64_t d = 0; d < GROUP * n_groups; d++)
    for (int r = 0; r < TOKENS; r++)
      for (int64_t l = 0; l < LANES; l++)
        out[LANES * r + l] += x[r][d] * w[d / GROUP * GROUP * LANES + GROUP * l + d % GROUP];
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
typedef int32_t Integers __attribute__((vector_size(64)));

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
constexpr int64_t ROWS = 8;  // read side by side, as registers allow
#else
constexpr int64_t ROWS = 4;
#endif

struct Pass {         // over rows of n floats
  int64_t n;
  float* to;          // set to the sum of by[r] * rows[r] if fresh, else increased by it
  bool fresh;
  const float* a;     // dots[r] become its products with the rows
  const float* rows[ROWS];
  float by[ROWS], dots[ROWS];

  template <int N, bool SUM, bool DOTS>
  void take() {
    Line sums[N] = {};
    const auto line = [&](int64_t i, const auto& read, const auto& write) {
      Line sum = {}, x = {};
      if (SUM && !fresh) sum = read(to + i);
      if (DOTS) x = read(a + i);
#pragma GCC unroll 8
      for (int r = 0; r < N; r++) {
        const Line row = read(rows[r] + i);
        if (SUM) sum += by[r] * row;
        if (DOTS) sums[r] += x * row;
      }
      if (SUM) write(to + i, sum);
    };
    int64_t i = 0;
    for (; i + LINE <= n; i += LINE)
      line(i, load<Line>, [](float* at, const Line& sum) { std::memcpy(at, &sum, sizeof(Line)); });
    if (i < n)  // the rest, padded with zeros: a row's sum does not depend on how many rows are read with it
      line(
          i, [&](const float* from) {
            Line part = {};
            std::memcpy(&part, from, sizeof(float) * (n - i));
            return part;
          }, [&](float* at, const Line& sum) { std::memcpy(at, &sum, sizeof(float) * (n - i)); });
#pragma GCC unroll 8
    for (int r = 0; r < N; r++)
      if (DOTS) dots[r] = sum_of(sums[r]);
  }

  template <bool SUM, bool DOTS, int N = ROWS>
  void take(int64_t n_rows) {
    if constexpr (N > 0) {
      if (n_rows == N) take<N, SUM, DOTS>();
      else take<SUM, DOTS, N - 1>(n_rows);
    }
  }
};

// Over places p in [first, last): if SUM, sets `to` (n,) to `start`, or 0 without it, plus the sum of value(p) * row(p);
// if DOTS, calls dot(p, a . row(p)) for each.
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
// rounding

const Integers LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

inline Line shuffled(const Line& a, const Integers& from) {
#if defined(__clang__)
  Line out;
  for (int l = 0; l < LINE; l++) out[l] = a[from[l]];
  return out;
#else
  return __builtin_shuffle(a, from);
#endif
}

inline Line mixed(Line a) {  // by Hadamard's transform
#pragma GCC unroll 4
  for (int h = 1; h < LINE; h *= 2) a = shuffled(a, LANE ^ h) + a * __builtin_convertvector(1 + 2 * ((LANE & h) != 0), Line);
  return a;
}

// Rotates n numbers by Hadamard transforms of blocks, each as long as a power of two allows. Products of rotated rows
// equal those of the rows, but no number of a row is an outlier, which would cost the others their bits when rounded.
void rotate(const float* from, int64_t n, float* to) {
  int64_t at = 0, lines = n / LINE;
  while (lines > 0) {
    int64_t size = 1;
    while (2 * size <= lines) size *= 2;
    const float scale = 1 / std::sqrt((float)(size * LINE));
    float* block = to + at;
    for (int64_t i = 0; i < size; i++) {
      const Line line = mixed(load<Line>(from + at + i * LINE)) * scale;
      std::memcpy(block + i * LINE, &line, sizeof(Line));
    }
    for (int64_t half = LINE; half < size * LINE; half *= 2)
      for (int64_t i = 0; i < size * LINE; i += 2 * half)
        for (int64_t l = i; l < i + half; l++) {
          const float a = block[l], b = block[l + half];
          block[l] = a + b, block[l + half] = a - b;
        }
    at += size * LINE, lines -= size;
  }
  std::copy(from + at, from + n, to + at);
}

struct Row {    // its rotation is about unit * (integers - offset)
  float unit;
  float norm;
  float error;  // a little above the norm of the rounding error

  // The bound on the error of a product with a row w: per |w|, with the error of float32 itself, and per the norm of the
  // rounding error of w
  float per_norm(int64_t D) const { return error + per_error() * lost(D); }
  float per_error() const { return norm + error; }

  // The error of float32, per |x| |w|: a sum of D products is D / LINE and at most 70 further additions in turn; rotating
  // and rounding both rows loses 2^-24 of a norm 23 times each, the rest 4 times.
  static float lost(int64_t D) { return (D / LINE + 120) * 0x1p-24f; }
};

// Every sum of products stays below 2^31: products of 8 bits are small, and rows of 16-bit integers have a norm of at most
// 46340 = sqrt(2^31).
template <class Integer>
Row round_row(const float* row, int64_t D, int32_t offset, Integer* to, std::vector<float>& scratch) {
  scratch.resize(D);
  float* rotated = scratch.data();
  rotate(row, D, rotated);
  const float most = std::max(largest(rotated, D), 1e-30f), per_most = 1 / most;  // the square of most may overflow
  float square = 0, error = 0;
#pragma omp simd reduction(+ : square)
  for (int64_t d = 0; d < D; d++) square += rotated[d] * per_most * (rotated[d] * per_most);
  const float norm = most * std::sqrt(square), room = 46338.0f - 0.5f * std::sqrt((float)D);
  if (!(norm <= FLT_MAX)) {  // no bound exists
    std::fill(to, to + D, offset);
    return {0, norm, norm};
  }
  const float unit = sizeof(Integer) == 1 ? most / 127.0f : std::max(norm / room, most / 32766.0f), per_unit = 1 / unit;
#pragma omp simd reduction(+ : error)
  for (int64_t d = 0; d < D; d++) {
    const float units = rotated[d] * per_unit, q = std::nearbyintf(units);
    error += (units - q) * (units - q);
    to[d] = (Integer)((int32_t)q + offset);
  }
  return {unit, norm, unit * std::sqrt(error) * 1.01f};
}

template <class Integer>
Tensor integers(int64_t n) {  // at 64 bytes: torch's own alignment
  return at::empty({n * (int64_t)sizeof(Integer)}, at::TensorOptions().dtype(at::kByte));
}

template <class Integer>
struct RoundedTokens {
  std::vector<Row> rows;
  Tensor memory;
  Integer* data;

  RoundedTokens(const float* x, int64_t B, int64_t D, int64_t width, int32_t offset)
      : rows(B), memory(integers<Integer>(B * width)), data((Integer*)memory.data_ptr()) {
    by_blocks(B, 64, [&](int64_t begin, int64_t end) {
      std::vector<float> scratch;
      for (int64_t i = begin; i < end; i++) {
        rows[i] = round_row(x + i * D, D, offset, data + i * width, scratch);
        std::fill(data + i * width + D, data + (i + 1) * width, 0);
      }
    });
  }
};

struct RoundedLatents {  // in tiles, the last one padded with latents of zeros
  std::vector<float> unit, norm, error;
  std::vector<int32_t> start;  // of sums: minus what the tokens' offset adds
  Tensor memory;
  LatentInteger* data;

  RoundedLatents(const float* W, int64_t F, int64_t D, int64_t width) {
    const int64_t n_tiles = (F + LANES - 1) / LANES;
    for (auto* list : {&unit, &norm, &error}) list->resize(n_tiles * LANES);
    start.resize(n_tiles * LANES);
    memory = integers<LatentInteger>(n_tiles * LANES * width), data = (LatentInteger*)memory.data_ptr();
    by_blocks(n_tiles, 8, [&](int64_t begin, int64_t end) {
      std::vector<LatentInteger> row(width);
      std::vector<float> scratch;
      for (int64_t f = begin * LANES; f < end * LANES; f++) {
        std::fill(row.begin(), row.end(), 0);
        if (f < F) {
          const Row about = round_row(W + f * D, D, 0, row.data(), scratch);
          unit[f] = about.unit, norm[f] = about.norm, error[f] = about.error;
          start[f] = -OFFSET * std::accumulate(row.begin(), row.end(), 0);
        }
        int32_t* to = (int32_t*)(data + f / LANES * LANES * width) + f % LANES;
        for (int64_t g = 0; g < width / GROUP; g++) to[g * LANES] = load<int32_t>(&row[g * GROUP]);
      }
    });
  }
};

// ------------------------------------------------------------------------------------------------
// candidates

// The bits of those of LANES values that reach a threshold
inline uint32_t reaching(const float* values, float threshold) {
  uint32_t bits = 0;
#if defined(__AVX512BW__)
  const __m512 least = _mm512_set1_ps(threshold);
  bits = _mm512_cmp_ps_mask(_mm512_loadu_ps(values), least, _CMP_GE_OQ) |
         (uint32_t)_mm512_cmp_ps_mask(_mm512_loadu_ps(values + LINE), least, _CMP_GE_OQ) << LINE;
#elif defined(__AVX2__)
  const __m256 least = _mm256_set1_ps(threshold);
  for (int64_t l = 0; l < LANES; l += 8)
    bits |= (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(values + l), least, _CMP_GE_OQ)) << l;
#else
  for (int64_t l = 0; l < LANES; l++) bits |= (uint32_t)(values[l] >= threshold) << l;
#endif
  return bits;
}

// take(place) for all places below n whose bit is set; bits(first) are those of LANES places
template <class Bits, class Take>
inline void each_bit(int64_t n, const Bits& bits, const Take& take) {
  for (int64_t first = 0; first < n; first += LANES) {
    uint32_t set = bits(first);
    if (n - first < LANES) set &= (1u << (n - first)) - 1;
    for (; set; set &= set - 1) take(first + __builtin_ctz(set));
  }
}

// One of n >= k numbers that k to k + more of them reach, or more if some are equal; by bisection, since counting is quicker
// than sorting. Overwrites what follows them up to the next line.
float reached_by(float* of, int64_t n, int64_t k, int64_t more) {
  const int64_t n_lines = (n + LINE - 1) / LINE;
  std::fill(of + n, of + n_lines * LINE, std::numeric_limits<float>::quiet_NaN());  // compares false
  const auto each = [&](const auto& take) {
    for (int64_t i = 0; i < n_lines; i++) take(load<Line>(of + i * LINE));
  };
  Line low = Line{} + FLT_MAX, high = -low;
  each([&](const Line& line) { low = line < low ? line : low, high = line > high ? line : high; });
  float least = FLT_MAX, most = -FLT_MAX;
  for (int l = 0; l < LINE; l++) least = std::min(least, low[l]), most = std::max(most, high[l]);
  if (k == 1) return most;
  for (int64_t above = n; above > k + more;) {
    const float middle = 0.5f * least + 0.5f * most;
    if (!(least < middle && middle < most)) break;
    Integers counts = {};
    each([&](const Line& line) { counts -= line >= middle; });
    int32_t count = 0;
    for (int l = 0; l < LINE; l++) count += counts[l];
    if (count >= k) least = middle, above = count;
    else most = middle;
  }
  low = Line{} + FLT_MAX;
  each([&](const Line& line) { low = line >= least && line < low ? line : low; });
  float number = FLT_MAX;
  for (int l = 0; l < LINE; l++) number = std::min(number, low[l]);
  return number;
}

// Moves the k largest (values, latents) to the front, of equal ones the first latents; NaN counts as infinite.
void to_front(std::vector<std::pair<float, int64_t>>& of, int64_t k, bool absolute) {
  const auto size = [&](float v) {
    return std::isnan(v) ? std::numeric_limits<float>::infinity() : absolute ? std::fabs(v) : v;
  };
  std::nth_element(of.begin(), of.begin() + (k - 1), of.end(), [&](const auto& p, const auto& q) {
    return size(p.first) != size(q.first) ? size(p.first) > size(q.first) : p.second < q.second;
  });
}

struct Candidates {  // of a token, in the order of latents: intervals of the size of their pre-activations
  int64_t token, n = 0, room;       // room for n; a tile is added at once, which may need LANES more
  float unit, per_norm, per_error;  // of the token: an interval is middle +- (per_norm * |w| + per_error * |w - w'|)
  float threshold;                  // latents with an upper end below it were dropped
  std::unique_ptr<float[]> middle, upper;
  std::unique_ptr<int32_t[]> latent;

  Candidates(int64_t token_, const Row& row, int64_t D, int64_t room_, float threshold_)
      : token(token_), room(room_), unit(row.unit), per_norm(row.per_norm(D)), per_error(row.per_error()),
        threshold(threshold_), middle(new float[room_ + LANES]), upper(new float[room_ + LANES]),
        latent(new int32_t[room_ + LANES]) {}

  void grow() {
    const auto longer = [&](auto& list) {
      auto old = std::exchange(list, nullptr);
      list.reset(new std::decay_t<decltype(old[0])>[2 * room + LANES]);
      std::copy(old.get(), old.get() + n, list.get());
    };
    longer(middle), longer(upper), longer(latent);
    room *= 2;
  }

  // Adds those of a line of latents whose bits in found are set.
  void add(const Line& middles, const Line& uppers, const Integers& latents, uint32_t found) {
#if defined(__AVX512BW__)
    const __mmask16 bits = found;
    _mm512_storeu_ps(&middle[n], _mm512_maskz_compress_ps(bits, (__m512)middles));
    _mm512_storeu_ps(&upper[n], _mm512_maskz_compress_ps(bits, (__m512)uppers));
    _mm512_storeu_si512(&latent[n], _mm512_maskz_compress_epi32(bits, (__m512i)latents));
    n += __builtin_popcount(found);
#else
    for (; found; found &= found - 1, n++) {
      const int l = __builtin_ctz(found);
      middle[n] = middles[l], upper[n] = uppers[l], latent[n] = latents[l];
    }
#endif
  }

  // Raises the threshold to what k latents reach if their errors are at most `part` of the bound, and drops the latents
  // that do not reach it.
  void narrow(int64_t k, float part, std::vector<float>& scratch) {
    scratch.resize(room + LANES);
    for (int64_t p = 0; p < n; p++) scratch[p] = middle[p] - part * (upper[p] - middle[p]);
    threshold = std::max(threshold, reached_by(scratch.data(), n, k, k / 4));
    const int64_t end = std::exchange(n, 0);
    each_bit(end, [&](int64_t p) { return reaching(&upper[p], threshold); }, [&](int64_t p) {
      middle[n] = middle[p], upper[n] = upper[p], latent[n++] = latent[p];
    });
  }
};

struct Computed {  // the pre-activations of a token's candidates that were computed again in float32
  int64_t n;
  std::vector<int32_t> places;          // their places among the candidates
  std::vector<float> sizes;             // in the order of places
  std::vector<float> values, by_place;  // by candidate: pre-activations, and their sizes, NaN where not computed

  void start(int64_t n_candidates) {
    n = 0;
    const int64_t room = n_candidates + LANES;
    if (room > (int64_t)places.size()) places.resize(room), sizes.resize(room), values.resize(room), by_place.resize(room);
    std::fill(by_place.begin(), by_place.begin() + room, std::numeric_limits<float>::quiet_NaN());
  }
};

struct Encoder {
  int64_t B, D, F, width, k = 1;
  bool absolute = false;
  float usual = 0;  // mean bias
  const float *x, *W, *b;
  RoundedTokens<TokenInteger> tokens;
  RoundedLatents latents;
  std::vector<float> of_bias;  // NaN in the padding, which compares false
  std::vector<float> slack;    // the error of adding the bias
  int64_t* indices = nullptr;
  float* values = nullptr;

  static const Tensor& checked(const Tensor& x, const Tensor& W, const Tensor& b) {
    TORCH_CHECK(x.is_contiguous() && W.is_contiguous() && b.is_contiguous());
    TORCH_CHECK(W.size(1) == x.size(1) && b.numel() == W.size(0));
    TORCH_CHECK(x.size(1) <= 1 << 17);  // or sums would leave 32 bits
    return x;
  }

  // bias: added to the product before it is compared with thresholds: b, or b less a floor
  Encoder(const Tensor& x_, const Tensor& W_, const Tensor& b_, const float* bias)
      : B(checked(x_, W_, b_).size(0)), D(x_.size(1)), F(W_.size(0)), width((D + GROUP - 1) / GROUP * GROUP),
        x(x_.const_data_ptr<float>()), W(W_.const_data_ptr<float>()), b(b_.const_data_ptr<float>()),
        tokens(x, B, D, width, OFFSET), latents(W, F, D, width),
        of_bias(latents.norm.size(), std::numeric_limits<float>::quiet_NaN()), slack(latents.norm.size()) {
    for (int64_t j = 0; j < F; j++) {
      slack[j] = std::max(std::fabs(bias[j]), std::fabs(b[j])) * 0x1p-21f + FLT_MIN;  // no interval is empty
      of_bias[j] = bias[j];
    }
  }

  // Adds to n lists, which have the room, the latents of tile t whose upper end reaches the list's threshold.
  void add(Candidates* lists, int64_t n, const int32_t* sums, int64_t t) const {
    Line unit[2], norm[2], error[2], bias[2], more[2];  // in registers
    for (int h = 0; h < 2; h++) {
      const int64_t at = t * LANES + h * LINE;
      unit[h] = load<Line>(&latents.unit[at]), bias[h] = load<Line>(&of_bias[at]), more[h] = load<Line>(&slack[at]);
      norm[h] = load<Line>(&latents.norm[at]), error[h] = load<Line>(&latents.error[at]);
    }
    for (Candidates* c = lists; c < lists + n; c++, sums += LANES) {
      Line middle[2], upper[2];
      for (int h = 0; h < 2; h++) {
        middle[h] = __builtin_convertvector(load<Integers>(sums + h * LINE), Line) * unit[h] * c->unit + bias[h];
        if (absolute) middle[h] = (Line)((Integers)middle[h] & 0x7fffffff);
        upper[h] = middle[h] + (norm[h] * c->per_norm + (error[h] * c->per_error + more[h]));
      }
      const uint32_t found = reaching((const float*)upper, c->threshold);
      if (!found) continue;
      for (int h = 0; h < 2; h++)
        c->add(middle[h], upper[h], LANE + (int32_t)(t * LANES + h * LINE), found >> (16 * h) & 0xFFFF);
    }
  }

  // Computes those of a list's places whose bits(place) are set; returns the k-th largest size computed so far.
  template <class Bits>
  float compute(const Candidates& c, Computed& s, const Bits& bits) const {
    const int64_t first = s.n;
    each_bit(c.n, bits, [&](int64_t p) { s.places[s.n++] = p; });
    dot_rows(
        x + c.token * D, first, s.n, D, [&](int64_t q) { return W + c.latent[s.places[q]] * D; },
        [&](int64_t q, float dot) {
          const int32_t p = s.places[q];
          s.values[p] = dot + b[c.latent[p]];
          s.sizes[q] = s.by_place[p] = absolute ? std::fabs(s.values[p]) : s.values[p];
        });
    return reached_by(s.sizes.data(), s.n, k, 0);
  }

  // Writes the k best of a list, of equal ones the first latents; false if they may not be the k best of all.
  bool finish(const Candidates& c, Computed& s) const {
    if (c.n < k) return false;
    s.start(c.n);
    const float likely = reached_by(c.middle.get(), c.n, k, k / 8);
    const auto is_likely = [&](int64_t p) { return reaching(&c.middle[p], likely); };
    const float least = compute(c, s, is_likely);
    const float kth = compute(c, s, [&](int64_t p) { return reaching(&c.upper[p], least) & ~is_likely(p); });
    int64_t equal = k, slot = c.token * k;
    const int64_t end = slot + k;
    for (int64_t q = 0; q < s.n; q++) equal -= s.sizes[q] > kth;
    each_bit(c.n, [&](int64_t p) { return reaching(&s.by_place[p], kth); }, [&](int64_t p) {
      if (slot == end || (s.by_place[p] == kth && equal-- <= 0)) return;
      values[slot] = s.values[p], indices[slot++] = c.latent[p];
    });
    return slot == end && kth >= c.threshold;
  }

  // Multiplies tokens with all latents; a list keeps the latents whose upper end reaches its threshold, which
  // Candidates::narrow raises unless part is 0.
  void scan(std::vector<Candidates>& lists, float part) const {
    std::vector<float> scratch;
    alignas(64) int32_t sums[TOKENS * LANES];
    const TokenInteger* of[TOKENS];
    const int64_t n = lists.size();
    for (int64_t t = 0; t * LANES < F; t++) {
      const LatentInteger* w = latents.data + t * LANES * width;
      for (int64_t r0 = 0; r0 < n; r0 += TOKENS) {
        for (int64_t r = 0; r < TOKENS; r++) of[r] = tokens.data + lists[std::min(r0 + r, n - 1)].token * width;
        tile(of, w, width / GROUP, &latents.start[t * LANES], sums);
        const int64_t end = std::min(r0 + TOKENS, n);
        add(&lists[r0], end - r0, sums, t);
        for (int64_t r = r0; r < end; r++) {
          Candidates& c = lists[r];
          if (c.n + LANES <= c.room) continue;
          if (part > 0) c.narrow(k, part, scratch);
          if (2 * c.n > c.room) c.grow();
        }
      }
    }
  }

  // The k best of some tokens. start: a token's first threshold is usual + start * its norm. failed: gets the tokens
  // whose result is not proven.
  void panel(const int64_t* rows, int64_t n, float start, float part, std::vector<int64_t>& failed) const {
    std::vector<Candidates> lists;
    for (int64_t r = 0; r < n; r++) {
      const Row& row = tokens.rows[rows[r]];
      lists.emplace_back(rows[r], row, D, 8 * k + 4 * LANES, start == -FLT_MAX ? start : usual + start * row.norm);
    }
    scan(lists, part);
    Computed scratch;
    for (Candidates& c : lists)
      if (!finish(c, scratch)) failed.push_back(c.token);
  }

  // Tokens in panels of one size, the same number for each thread, so that none waits for the last one.
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

  // All of rows, in parallel; returns the tokens whose result is not proven, in order.
  std::vector<int64_t> run(const std::vector<int64_t>& rows, float start, float part) const {
    const Panels panels(rows.size());
    std::vector<std::vector<int64_t>> failed(panels.count);
    panels.each([&](int64_t p, int64_t from, int64_t n) { panel(&rows[from], n, start, part, failed[p]); });
    std::vector<int64_t> all;
    for (auto& f : failed) all.insert(all.end(), f.begin(), f.end());
    return all;
  }

  int64_t all_tokens() {
    std::vector<int64_t> pilot, rest;
    const int64_t every = std::max<int64_t>(1, B / PILOT);
    for (int64_t i = 0; i < B; i++) (i % every == 0 ? pilot : rest).push_back(i);
    without_bounds(run(pilot, -FLT_MAX, 1));
    float start = FLT_MAX;  // the least k-th best of the pilot, per norm, less 5%
    if (!absolute) usual = std::accumulate(b, b + F, 0.0) / F;
    for (int64_t i : pilot) {
      float least = FLT_MAX;
      for (int64_t s = 0; s < k; s++) least = std::min(least, absolute ? std::fabs(values[i * k + s]) : values[i * k + s]);
      if (tokens.rows[i].norm > 0) start = std::min(start, (least - usual) / tokens.rows[i].norm);
    }
    start = start < FLT_MAX ? start - 0.05f * std::fabs(start) : -FLT_MAX;
    const std::vector<int64_t> again = run(rest, start, PART);
    without_bounds(run(again, -FLT_MAX, 1));
    return again.size();
  }

  void without_bounds(const std::vector<int64_t>& rows) const {
    by_blocks(rows.size(), 1, [&](int64_t p, int64_t) { without_bounds(rows[p]); });
  }

  void without_bounds(int64_t i) const {
    std::vector<std::pair<float, int64_t>> all(F);
    dot_rows(
        x + i * D, 0, F, D, [&](int64_t f) { return W + f * D; }, [&](int64_t f, float dot) { all[f] = {dot + b[f], f}; });
    to_front(all, k, absolute);
    for (int64_t s = 0; s < k; s++) std::tie(values[i * k + s], indices[i * k + s]) = all[s];
  }
};

// x (B, D), W (F, D), b (F,) -> indices (B, k), values (B, k) = (x @ W^T + b) there, tokens that took two attempts
std::tuple<Tensor, Tensor, int64_t> encode_top_k(
    const Tensor& x, const Tensor& W, const Tensor& b, int64_t k, bool absolute) {
  TORCH_CHECK(k >= 1 && k <= W.size(0));
  Tensor indices = at::empty({x.size(0), k}, x.options().dtype(at::kLong)), values = at::empty({x.size(0), k}, x.options());
  if (x.size(0) == 0) return {indices, values, 0};
  Encoder e(x, W, b, b.const_data_ptr<float>());
  e.k = k, e.absolute = absolute;
  e.indices = indices.mutable_data_ptr<int64_t>(), e.values = values.mutable_data_ptr<float>();
  return {indices, values, e.all_tokens()};
}

// x (B, D), W (F, D), b (F,), floor (F,) -> the places where x @ W^T + b exceeds floor, token by token: latents (n,),
// values (n,), and where those of each token begin (B,)
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
    std::vector<Candidates> lists;
    for (int64_t i = first; i < first + n; i++) lists.emplace_back(i, e.tokens.rows[i], D, 8 * LANES, 0.f);
    e.scan(lists, 0);
    for (const Candidates& c : lists)
      dot_rows(
          e.x + c.token * D, 0, c.n, D, [&](int64_t q) { return e.W + c.latent[q] * D; },
          [&](int64_t q, float dot) {
            const int32_t latent = c.latent[q];
            const float value = dot + e.b[latent];
            if (value > at_least[latent]) found[p].emplace_back(latent, value), counts[c.token]++;
          });
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
// few tokens: reading W takes the time, and an 8-bit copy is a quarter of it to read. The proof is as above.

// W (F, D) -> its rows rotated, as integers (F, D), and each row's unit, norm, and norm of the rounding error (3, F)
std::tuple<Tensor, Tensor> pack(const Tensor& W) {
  const int64_t F = W.size(0), D = W.size(1);
  TORCH_CHECK(W.is_contiguous() && D <= 1 << 17);  // or sums would leave 32 bits
  Tensor rows = at::empty({F, D}, W.options().dtype(at::kChar)), about = at::empty({3, F}, W.options());
  const float* w = W.const_data_ptr<float>();
  int8_t* to = rows.mutable_data_ptr<int8_t>();
  float* of = about.mutable_data_ptr<float>();
  by_blocks(F, 512, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch;
    for (int64_t f = begin; f < end; f++) {
      const Row row = round_row(w + f * D, D, 0, to + f * D, scratch);
      of[f] = row.unit, of[F + f] = row.norm, of[2 * F + f] = row.error;
    }
  });
  return {rows, about};
}

// One row after the other: a single stream of memory is the fastest.
int32_t dot(const int16_t* x, const int8_t* w, int64_t D) {
  int64_t d = 0;
  int32_t sum = 0;
#if defined(__AVX512BW__)
  __m512i sums[4];
  for (__m512i& s : sums) s = _mm512_setzero_si512();
  const auto add = [&](__m512i& to, int64_t at) {
    to = add_pairs(to, _mm512_loadu_si512(x + at), _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)(w + at))));
  };
  for (; d + 128 <= D; d += 128)
    for (int64_t q = 0; q < 4; q++) add(sums[q], d + 32 * q);
  for (; d + 32 <= D; d += 32) add(sums[0], d);
  sum = _mm512_reduce_add_epi32(_mm512_add_epi32(_mm512_add_epi32(sums[0], sums[1]), _mm512_add_epi32(sums[2], sums[3])));
#endif
  for (; d < D; d++) sum += x[d] * w[d];
  return sum;
}

struct Screen {  // all products x @ W^T + b, approximately, and bounds on their errors
  int64_t B, D, F;
  const float *x, *W, *b;
  std::vector<float> about, bound;  // (B, F)

  Screen(const Tensor& x_, const Tensor& W_, const Tensor& b_, const Tensor& rows, const Tensor& of_rows)
      : B(x_.size(0)), D(x_.size(1)), F(W_.size(0)), about(B * F), bound(B * F) {
    for (const Tensor& t : {x_, W_, b_, rows, of_rows}) TORCH_CHECK(t.is_contiguous());
    TORCH_CHECK(W_.size(1) == D && b_.numel() == F && rows.sizes() == W_.sizes() && of_rows.numel() == 3 * F);
    x = x_.const_data_ptr<float>(), W = W_.const_data_ptr<float>(), b = b_.const_data_ptr<float>();
    const RoundedTokens<int16_t> tokens(x, B, D, D, 0);
    const int8_t* w = rows.const_data_ptr<int8_t>();
    const float *unit = of_rows.const_data_ptr<float>(), *norm = unit + F, *error = unit + 2 * F;
    by_blocks(F, 256, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; j++)
        for (int64_t i = 0; i < B; i++) {
          const Row& token = tokens.rows[i];
          about[i * F + j] = (float)dot(tokens.data + i * D, w + j * D, D) * unit[j] * token.unit + b[j];
          bound[i * F + j] = norm[j] * token.per_norm(D) + error[j] * token.per_error() + std::fabs(b[j]) * 0x1p-21f;
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
  // The k-th largest of the groups' largest lower ends: k latents reach it, so the k best do.
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
    if ((int64_t)best.size() < k) {  // numbers that are not finite have no bounds
      best.clear();
      for (int64_t j = 0; j < s.F; j++) best.emplace_back(s.exact(i, j), j);
    }
    to_front(best, k, absolute);
    for (int64_t p = 0; p < k; p++) {
      values.mutable_data_ptr<float>()[i * k + p] = best[p].first;
      indices.mutable_data_ptr<int64_t>()[i * k + p] = best[p].second;
    }
  }
  return {indices, values};
}

// Likewise the places where x @ W^T + b exceeds floor (F,): latents (n,), values (n,), where each token's begin (B,)
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

// Where each token's places are: K each of (B, K) indices; of flat ones, those from offsets (B,) on
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

// The places of all tokens in the order of their latents, and for one latent in the order of tokens: where each latent's
// begin (F + 1,), and (token, place) of each (n, 2); int32. And the number of tokens.
std::tuple<Tensor, Tensor, int64_t> by_latent(const Tensor& indices, const c10::optional<Tensor>& offsets, int64_t F) {
  const Places places(indices, offsets, F);
  const int64_t n_parts = std::min(8, at::get_num_threads()), size = (places.B + n_parts - 1) / n_parts;
  std::vector<std::vector<int32_t>> next(n_parts, std::vector<int32_t>(F, 0));  // where a latent's next place goes
  const auto each = [&](const auto& take) {  // take(next of this part of the tokens, token, place)
    by_blocks(n_parts, 1, [&](int64_t part, int64_t) {
      for (int64_t i = part * size; i < std::min(places.B, (part + 1) * size); i++)
        for (int64_t p = places.begin(i); p < places.end(i); p++) take(next[part], i, p);
    });
  };
  each([&](auto& counts, int64_t, int64_t p) { counts[places.at[p]]++; });
  const auto options = indices.options().dtype(at::kInt);
  Tensor starts = at::empty({F + 1}, options);
  int32_t* start = starts.mutable_data_ptr<int32_t>();
  start[0] = 0;
  for (int64_t f = 0; f < F; f++) {
    start[f + 1] = start[f];
    for (auto& counts : next) start[f + 1] += std::exchange(counts[f], start[f + 1]);
  }
  TORCH_CHECK(start[F] == places.n, "offsets begin above 0");
  Tensor sorted = at::empty({places.n, 2}, options);
  int32_t* to = sorted.mutable_data_ptr<int32_t>();
  each([&](auto& at, int64_t i, int64_t p) {
    int32_t* place = to + 2 * at[places.at[p]]++;
    place[0] = i, place[1] = p;
  });
  return {starts, sorted, places.B};
}

struct ByLatent {  // what by_latent returned
  const int32_t *starts, *places;
  int64_t F;

  ByLatent(const Tensor& starts_, const Tensor& places_, int64_t n_tokens, const Tensor& values, const Tensor& x)
      : starts(starts_.const_data_ptr<int32_t>()), places(places_.const_data_ptr<int32_t>()), F(starts_.numel() - 1) {
    TORCH_CHECK(starts_.is_contiguous() && places_.is_contiguous() && values.is_contiguous() && x.is_contiguous());
    TORCH_CHECK(places_.size(0) == values.numel() && x.size(0) == n_tokens);
  }

  int64_t token(int64_t p) const { return places[2 * p]; }
  int64_t place(int64_t p) const { return places[2 * p + 1]; }
};

// (F, D): for each latent the sum of values[place] * x[token] over the places whose index is that latent
Tensor sum_by_latent(const Tensor& starts, const Tensor& places, int64_t n_tokens, const Tensor& values, const Tensor& x) {
  const ByLatent by(starts, places, n_tokens, values, x);
  const int64_t F = by.F, D = x.size(1);
  const float *v = values.const_data_ptr<float>(), *rows = x.const_data_ptr<float>();
  Tensor out = at::empty({F, D}, x.options());
  float* to = out.mutable_data_ptr<float>();
  by_blocks(F, 128, [&](int64_t begin, int64_t end) {
    std::vector<std::pair<const float*, float>> terms;  // not those of value 0, of which AuxK has many
    for (int64_t f = begin; f < end; f++) {
      terms.clear();
      for (int64_t p = by.starts[f]; p < by.starts[f + 1]; p++)
        if (const float value = v[by.place(p)]; value != 0) terms.emplace_back(rows + by.token(p) * D, value);
      sum_rows(
          to + f * D, nullptr, 0, terms.size(), D, [&](int64_t q) { return terms[q].first; },
          [&](int64_t q) { return terms[q].second; });
    }
  });
  return out;
}

// The gradients of a bag, from grad (B, D): of values, dot_at(grad, W), and of W (F, D), sum_by_latent(values, grad); in one
// pass over grad's rows
std::tuple<Tensor, Tensor> bag_backward(
    const Tensor& starts, const Tensor& places, int64_t n_tokens, const Tensor& values, const Tensor& grad,
    const Tensor& W) {
  const ByLatent by(starts, places, n_tokens, values, grad);
  const int64_t F = by.F, D = W.size(1);
  TORCH_CHECK(W.is_contiguous() && W.size(0) == F && grad.size(1) == D);
  const float *v = values.const_data_ptr<float>(), *rows = grad.const_data_ptr<float>(), *w = W.const_data_ptr<float>();
  Tensor of_values = at::empty(values.sizes(), grad.options()), of_W = at::empty({F, D}, grad.options());
  float *dots = of_values.mutable_data_ptr<float>(), *to = of_W.mutable_data_ptr<float>();
  by_blocks(F, 128, [&](int64_t begin, int64_t end) {
    for (int64_t f = begin; f < end; f++)
      each_row<true, true>(
          by.starts[f], by.starts[f + 1], D, [&](int64_t p) { return rows + by.token(p) * D; },
          [&](int64_t p) { return v[by.place(p)]; }, nullptr, to + f * D, w + f * D,
          [&](int64_t p, float dot) { dots[by.place(p)] = dot; });
  });
  return {of_values, of_W};
}

// Shaped like indices: left[token] . right[indices[place]]
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

// (B, D): each token's sum of values[place] * W[indices[place]] over its places, plus bias (D,) or (B, D) if given
Tensor bag(
    const Tensor& indices, const c10::optional<Tensor>& offsets, const Tensor& values, const Tensor& W,
    const c10::optional<Tensor>& bias) {
  const Places places(indices, offsets, W.size(0));
  const int64_t D = W.size(1);
  TORCH_CHECK(values.is_contiguous() && W.is_contiguous() && values.numel() == places.n);
  const bool own = bias && bias->dim() == 2;  // each token has a bias of its own
  TORCH_CHECK(!bias || (bias->is_contiguous() && bias->numel() == (own ? places.B * D : D)));
  const float *v = values.const_data_ptr<float>(), *w = W.const_data_ptr<float>();
  const float* first = bias ? bias->const_data_ptr<float>() : nullptr;
  Tensor out = at::empty({places.B, D}, W.options());
  float* to = out.mutable_data_ptr<float>();
  by_blocks(places.B, 128, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      sum_rows(
          to + i * D, own ? first + i * D : first, places.begin(i), places.end(i), D,
          [&](int64_t p) { return w + places.at[p] * D; }, [&](int64_t p) { return v[p]; });
  });
  return out;
}

// How many values of each token are not 0 (B,), and how many of each latent (F,)
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

// In place: subtracts from each row of grad (F, D) its part along the same row of W
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

// In place: scales each row of W (F, D) to unit norm; returns the factors (F, 1)
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

// Sum of squares of grad; with W, of grad's rows (F, D) without their part along the rows of W
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

// Adam's moments, in float32, or in bfloat16 with stochastic rounding: small changes of a large number then count on
// average, while rounding to the nearest would lose them every time.
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

// In place, Adam (Kingma & Ba 2015, algorithm 1) on four tensors of the same layout, with the gradient times
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
  m.def("encode_above(Tensor x, Tensor W, Tensor b, Tensor floor) -> (Tensor, Tensor, Tensor)");
#endif
  m.def("pack(Tensor W) -> (Tensor, Tensor)");
  m.def("packed_top_k(Tensor x, Tensor W, Tensor b, Tensor rows, Tensor of_rows, int k, bool absolute) -> (Tensor, Tensor)");
  m.def("packed_above(Tensor x, Tensor W, Tensor b, Tensor rows, Tensor of_rows, Tensor floor) -> (Tensor, Tensor, Tensor)");
  m.def("by_latent(Tensor indices, Tensor? offsets, int n_latents) -> (Tensor, Tensor, int)");
  m.def("sum_by_latent(Tensor starts, Tensor places, int n_tokens, Tensor values, Tensor x) -> Tensor");
  m.def("bag(Tensor indices, Tensor? offsets, Tensor values, Tensor W, Tensor? bias) -> Tensor");
  m.def(
      "bag_backward(Tensor starts, Tensor places, int n_tokens, Tensor values, Tensor grad, Tensor W) -> (Tensor, Tensor)");
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
  m.impl("by_latent", by_latent);
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
