// decode_step on CPU: a whole decoder over the paged KV cache in one call.
//
// Layout   Activations are float32 in panels of up to 64 tokens, [feature][token] (panels.h).
// Bytes    the weights once a 64 tokens, 2 L Hkv D s a cached position a row; up to 16 tokens of one prompt read it once together (tiles.h).
// Scratch  of attention: at most 1 MiB of scores a thread, or those of one token's heads, four at a time, where they are more.
// Numerics float32 from the embedding to the last norm, rounded only into the cache (of the weights' dtype, or float32) and the result. Every sum has one order, which depends on the
//          sizes of the model alone (and for attention on the token's own position): not on companions, panel widths, or threads. Lanes are tokens,
//          so no function of a vector may take another path for another lane's sake: cos and sin come from a table, one row a position.
// Checked  beforehand and in one place (`check_ranges`), so that no index leaves its tensor.
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "tiles.h"
#include "panels.h"

namespace {

using at::Tensor;

// ---- the step ------------------------------------------------------------------------------------------------------------
struct Tokens {
  const int64_t *ids, *positions, *rows;
  const int32_t* table;
  int64_t N, B, M;
};

enum Part {
  INPUT_NORM, QKV, QKV_BIAS, Q_NORM, K_NORM, O, O_BIAS, POST_NORM, GATE_UP, GATE_UP_BIAS, DOWN, DOWN_BIAS, ATTENTION_OUT_NORM, MLP_OUT_NORM,
  INPUT_NORM_BIAS, POST_NORM_BIAS, PARTS
};

// LoRA: s B (A x) is added to a slice of the rows of one of the four products.
struct Slice {
  int64_t first, rows;
};
enum Product { QKV_PRODUCT, O_PRODUCT, GATE_UP_PRODUCT, DOWN_PRODUCT, PRODUCTS };

template <typename T>
struct Layer {
  const T* part[PARTS];
  const T *a[PRODUCTS] = {}, *b[PRODUCTS] = {};  // of the slices of a product one below the other: a [r, K] each, b [rows, r] each
  int64_t rank[PRODUCTS] = {};
  int64_t window, rope;  // rope: the table of angles, or -1
  bool heads_together;   // q's heads share one norm, and so do k's
};

struct Sizes {
  int64_t H, F, heads, kv_heads, D, S, pairs;  // pairs: of each head the first 2 pairs values turn
  bool gated;                                  // the MLP's first product holds gates, then what they multiply
  int64_t group() const { return heads / kv_heads; }
  int64_t qkv() const { return (heads + 2 * kv_heads) * D; }
  int64_t up() const { return gated ? 2 * F : F; }
};

struct Options {
  float eps, attention_scale, attention_softcap, embedding_scale, norm_offset;
  Activation activation;
  bool parallel;  // the MLP reads the residual stream before attention is added to it
  float adapter_scale;
  std::vector<Slice> slices[PRODUCTS];  // alike in all layers
};

// A norm of all of a token's values: with a bias a LayerNorm, without one an RMSNorm.
template <typename T>
struct Norm {
  const T *weight, *bias;
  void operator()(const float* x, int64_t rows, int64_t width, const Options& options, float* y) const {
    if (bias) layer_norm(x, weight, bias, rows, width, options.eps, y);
    else rms_norm(x, weight, rows, width, options.eps, options.norm_offset, y);
  }
};

// cos and sin [tables, positions, pairs] of the angles by which a position turns.
struct Turns {
  const float *cos, *sin;
  int64_t tables, positions;
};

// What a token's vector starts from; `positions` is null where no table of them was learned.
template <typename T>
struct Embeddings {
  const T *tokens, *positions;
};

void check_ranges(const Tokens& tokens, int64_t vocabulary, int64_t positions, int64_t turned, int64_t blocks, int64_t S, int64_t reach, const int64_t* out, int64_t R) {
  for (int64_t n = 0; n < tokens.N; ++n) {
    const int64_t id = tokens.ids[n], position = tokens.positions[n], row = tokens.rows[n];
    TORCH_CHECK_INDEX(id >= 0 && id < vocabulary, "decode_step: token_ids[", n, "] = ", id, " is outside the vocabulary of ", vocabulary);
    TORCH_CHECK_INDEX(row >= 0 && row < tokens.B, "decode_step: rows[", n, "] = ", row, " is not a row of the block table of ", tokens.B);
    TORCH_CHECK_INDEX(position >= 0 && position < tokens.M * S, "decode_step: positions[", n, "] = ", position, " is outside the ", tokens.M,
                      " blocks of ", S, " in a row of the block table");
    TORCH_CHECK_INDEX(position < positions, "decode_step: positions[", n, "] = ", position, " is outside the ", positions, " learned positions");
    TORCH_CHECK_INDEX(position < turned, "decode_step: positions[", n, "] = ", position, " is outside the ", turned, " positions of the rotary table");
    for (int64_t b = std::max<int64_t>(0, position - reach + 1) / S; b <= position / S; ++b) {
      const int64_t block = tokens.table[row * tokens.M + b];
      TORCH_CHECK_INDEX(block >= 0 && block < blocks, "decode_step: block_table[", row, ", ", b, "] = ", block, " is not one of the ", blocks,
                        " blocks of the cache, and the token at position ", position, " needs it");
    }
  }
  for (int64_t r = 0; r < R; ++r)
    TORCH_CHECK_INDEX(out[r] >= 0 && out[r] < tokens.N, "decode_step: out_slots[", r, "] = ", out[r], " is not one of the ", tokens.N, " tokens");
}

// Rotates q and k, and writes k and v of every token into the layer's cache.
template <typename T, typename C>
void rope_and_cache(const Layer<T>& layer, const Sizes& z, const Options& options, const Tokens& tokens, const Panels& panels, const float* cos,
                    const float* sin, float* qkv, C* k_cache, C* v_cache) {
  at::parallel_for(0, panels.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t width = panels.width(p), angles = layer.rope * panels.lanes() * z.pairs + p * PANEL * z.pairs;
      float* panel = qkv + p * PANEL * z.qkv();
      const auto norm = [&](const T* weight, int64_t head, int64_t rows) {
        float* from = panel + head * z.D * width;
        if (weight) rms_norm(from, weight, rows, width, options.eps, options.norm_offset, from);
      };
      if (layer.heads_together) {
        norm(layer.part[Q_NORM], 0, z.heads * z.D);
        norm(layer.part[K_NORM], z.heads, z.kv_heads * z.D);
      }
      for (int64_t h = 0; h < z.heads + z.kv_heads; ++h) {
        if (!layer.heads_together) norm(layer.part[h < z.heads ? Q_NORM : K_NORM], h, z.D);
        if (layer.rope >= 0) rotate(panel + h * z.D * width, cos + angles, sin + angles, 2 * z.pairs, width);
      }
      for (int64_t c = 0; c < panels.used(p); ++c) {
        const int64_t n = p * PANEL + c, position = tokens.positions[n], slot = position % z.S;
        const int64_t block = tokens.table[tokens.rows[n] * tokens.M + position / z.S];
        for (int64_t h = 0; h < z.kv_heads; ++h) {
          C* k = k_cache + (block * z.kv_heads + h) * z.D * z.S + slot;
          C* v = v_cache + ((block * z.kv_heads + h) * z.S + slot) * z.D;
          const float* key = panel + (z.heads + h) * z.D * width + c;
          const float* value = key + z.kv_heads * z.D * width;
          for (int64_t d = 0; d < z.D; ++d) {
            k[d * z.S] = static_cast<C>(key[d * width]);
            v[d] = static_cast<C>(value[d * width]);
          }
        }
      }
    }
  });
}

// Neighbours of one row and consecutive positions: what a chunk of a prompt is.
struct Neighbours {
  int64_t begin, end;
};
std::vector<Neighbours> runs_of(const Tokens& tokens, int64_t most) {
  std::vector<Neighbours> runs;
  for (int64_t n = 0; n < tokens.N; ++n) {
    const bool goes_on = n > 0 && tokens.rows[n] == tokens.rows[n - 1] && tokens.positions[n] == tokens.positions[n - 1] + 1;
    if (goes_on && n - runs.back().begin < most) runs.back().end = n + 1;
    else runs.push_back({n, n + 1});
  }
  return runs;
}

template <typename T, typename C>
void attention(const Layer<T>& layer, const Sizes& z, const Options& options, const Tokens& tokens, const Panels& panels, const float* qkv,
               const C* k_cache, const C* v_cache, int64_t longest, float* out) {
  const Cache cache{z.kv_heads, z.D, z.S};
  const int64_t group = z.group(), ld = cache.scores(longest), size = group * z.D;
  const std::vector<Neighbours> runs = runs_of(tokens, tiles(cache) ? tile_tokens(group, ld) : 1);
  const int64_t tasks = static_cast<int64_t>(runs.size()) * z.kv_heads;
  const int64_t grain = std::max<int64_t>(1, TASK_FLOPS / (4 * size * ld * ((tokens.N + tasks) / std::max<int64_t>(1, runs.size()))));
  at::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> scores(4 * (ld + z.D)), result(size);
    TileSpace space;
    for (int64_t task = begin; task < end; ++task) {
      const Neighbours& run = runs[task / z.kv_heads];
      const int64_t head = task % z.kv_heads, count = run.end - run.begin, position = tokens.positions[run.begin];
      const auto lane = [&](int64_t n, int64_t rows, int64_t first) { return n / PANEL * PANEL * rows + first * panels.width(n / PANEL) + n % PANEL; };
      const TileTokens tile{tokens.table + tokens.rows[run.begin] * tokens.M, position, count, layer.window, options.attention_softcap};
      const float* attended = result.data();
      if (count > 1) {
        space.q.resize(count * size);
        for (int64_t t = 0; t < count; ++t) {
          const int64_t n = run.begin + t, width = panels.width(n / PANEL);
          const float* from = qkv + lane(n, z.qkv(), head * size);
          for (int64_t i = 0; i < size; ++i) space.q[t * size + i] = from[i * width] * options.attention_scale;
        }
        attend_tile(k_cache, v_cache, cache, head, tile, group, space);
        attended = space.out.data();
      } else {
        const Query query{qkv + lane(run.begin, z.qkv(), head * size), panels.width(run.begin / PANEL), options.attention_scale};
        attend_group(k_cache, v_cache, cache, head, Span{tile.blocks, tile.first(0), position, tile.cap}, group, query, scores.data(), ld, result.data());
      }
      for (int64_t t = 0; t < count; ++t) {
        const int64_t n = run.begin + t, width = panels.width(n / PANEL);
        float* to = out + lane(n, z.heads * z.D, head * size);
        for (int64_t i = 0; i < size; ++i) to[i * width] = attended[t * size + i];
      }
    }
  });
}

// y += s B (A x) in the adapted slices of a product; x panels of K rows, y panels of O rows, u room for panels of r rows.
template <typename T>
void adapt(const Layer<T>& layer, Product product, const Options& options, int64_t O, int64_t K, const Panels& panels, const float* x, float* y, float* u) {
  const int64_t r = layer.rank[product];
  if (!r) return;
  const T *a = layer.a[product], *b = layer.b[product];
  for (const Slice& slice : options.slices[product]) {
    linear(a, static_cast<const T*>(nullptr), r, K, panels, x, u, false);
    for (int64_t i = 0; i < panels.lanes() * r; i += VL) (Vec::loadu(u + i) * Vec(options.adapter_scale)).store(u + i);
    at::parallel_for(0, panels.count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p)
        linear(b, static_cast<const T*>(nullptr), slice.rows, r, Panels(panels.used(p)), u + p * PANEL * r,
               y + p * PANEL * O + slice.first * panels.width(p), true);
    });
    a += r * K;
    b += slice.rows * r;
  }
}

template <typename T, typename C>
void run(const std::vector<Layer<T>>& layers, const Sizes& z, const Options& options, const Tokens& tokens, Embeddings<T> embeddings, Norm<T> norm,
         const Turns& turns, C* k_cache, C* v_cache, int64_t layer_size, const int64_t* out_slots, int64_t R, T* out) {
  const Panels panels(tokens.N), read(R);
  const int64_t lanes = panels.lanes(), angles = turns.tables * z.pairs;
  const int64_t input = std::max({z.H, z.heads * z.D, z.F}), output = std::max({z.qkv(), z.up(), z.H});
  // x the residual stream, a the input of a linear layer, b its output where that is not the residual stream, inner what is between an adapter's products,
  // before the stream that attention read
  int64_t rank = 0;
  for (const Layer<T>& layer : layers) rank = std::max(rank, *std::max_element(layer.rank, layer.rank + PRODUCTS));
  Tensor workspace = at::empty({lanes * (z.H + input + output + 2 * angles + rank + (options.parallel ? z.H : 0)) + read.lanes() * z.H}, at::kFloat);
  float* x = workspace.mutable_data_ptr<float>();
  float* a = x + lanes * z.H;
  float* b = a + lanes * input;
  float* cos = b + lanes * output;
  float* sin = cos + lanes * angles;
  float* inner = sin + lanes * angles;
  float* last = inner + lanes * rank;
  float* before = last + read.lanes() * z.H;
  const auto each_panel = [](const Panels& of, auto&& body) {
    at::parallel_for(0, of.count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) body(p, of.width(p));
    });
  };
  // Where there is a weight, the norm of a stream in a; else the stream itself.
  const auto normed = [&](const Layer<T>& layer, Part w, Part bias, float* stream) {
    const Norm<T> by{layer.part[w], layer.part[bias]};
    if (!by.weight) return stream;
    each_panel(panels, [&](int64_t p, int64_t width) { by(stream + p * PANEL * z.H, z.H, width, options, a + p * PANEL * z.H); });
    return a;
  };
  // x += W a + bias, or the norm of that.
  const auto add = [&](const Layer<T>& layer, Part w, Part bias, Part norm_behind, Product product, int64_t K) {
    const T* behind = layer.part[norm_behind];
    linear(layer.part[w], layer.part[bias], z.H, K, panels, a, behind ? b : x, !behind);
    adapt(layer, product, options, z.H, K, panels, a, behind ? b : x, inner);
    if (behind)
      each_panel(panels, [&](int64_t p, int64_t width) {
        float *delta = b + p * PANEL * z.H, *stream = x + p * PANEL * z.H;
        rms_norm(delta, behind, z.H, width, options.eps, options.norm_offset, delta);
        for (int64_t i = 0; i < z.H * width; i += VL) (Vec::loadu(stream + i) + Vec::loadu(delta + i)).store(stream + i);
      });
  };

  each_panel(panels, [&](int64_t p, int64_t width) {
    for (int64_t c = 0; c < width; ++c) {
      const bool used = c < panels.used(p);  // lanes beyond the tokens are zeros, so that nothing in them is slow or infinite
      const T* row = embeddings.tokens + (used ? tokens.ids[p * PANEL + c] : 0) * z.H;
      for (int64_t h = 0; h < z.H; ++h) x[p * PANEL * z.H + h * width + c] = used ? to_float(row[h]) * options.embedding_scale : 0.0f;
      if (used && embeddings.positions) {
        const T* learned = embeddings.positions + tokens.positions[p * PANEL + c] * z.H;
        for (int64_t h = 0; h < z.H; ++h) x[p * PANEL * z.H + h * width + c] += to_float(learned[h]);
      }
      const int64_t position = used ? tokens.positions[p * PANEL + c] : 0;
      for (int64_t t = 0; t < turns.tables; ++t)
        for (int64_t d = 0; d < z.pairs; ++d) {
          const int64_t from = (t * turns.positions + position) * z.pairs + d, to = (t * lanes + p * PANEL) * z.pairs + d * width + c;
          cos[to] = turns.cos[from];
          sin[to] = turns.sin[from];
        }
    }
  });
  int64_t longest = 0;
  for (int64_t n = 0; n < tokens.N; ++n) longest = std::max(longest, tokens.positions[n]);

  for (size_t l = 0; l < layers.size(); ++l) {
    const Layer<T>& layer = layers[l];
    C* k = k_cache + l * layer_size;
    C* v = v_cache + l * layer_size;
    const float* h = normed(layer, INPUT_NORM, INPUT_NORM_BIAS, x);
    linear(layer.part[QKV], layer.part[QKV_BIAS], z.qkv(), z.H, panels, h, b, false);
    adapt(layer, QKV_PRODUCT, options, z.qkv(), z.H, panels, h, b, inner);
    rope_and_cache(layer, z, options, tokens, panels, cos, sin, b, k, v);
    if (lanes > tokens.N) std::fill(a, a + lanes * z.heads * z.D, 0.0f);
    attention(layer, z, options, tokens, panels, b, k, v, longest, a);
    if (options.parallel) std::copy(x, x + lanes * z.H, before);
    add(layer, O, O_BIAS, ATTENTION_OUT_NORM, O_PRODUCT, z.heads * z.D);
    h = normed(layer, POST_NORM, POST_NORM_BIAS, options.parallel ? before : x);
    linear(layer.part[GATE_UP], layer.part[GATE_UP_BIAS], z.up(), z.H, panels, h, b, false);
    adapt(layer, GATE_UP_PRODUCT, options, z.up(), z.H, panels, h, b, inner);
    each_panel(panels, [&](int64_t p, int64_t width) {
      activate(b + p * PANEL * z.up(), z.F * width, options.activation, z.gated, a + p * PANEL * z.F);
    });
    add(layer, DOWN, DOWN_BIAS, MLP_OUT_NORM, DOWN_PRODUCT, z.F);
  }

  each_panel(read, [&](int64_t p, int64_t width) {
    float* panel = last + p * PANEL * z.H;
    for (int64_t c = 0; c < width; ++c) {
      const bool used = c < read.used(p);
      const int64_t n = used && out_slots ? out_slots[p * PANEL + c] : p * PANEL + c;
      const float* from = used ? x + n / PANEL * PANEL * z.H + n % PANEL : nullptr;
      const int64_t step = used ? panels.width(n / PANEL) : 0;
      for (int64_t h = 0; h < z.H; ++h) panel[h * width + c] = used ? from[h * step] : 0.0f;
    }
    norm(panel, z.H, width, options, panel);
    for (int64_t c = 0; c < read.used(p); ++c)
      for (int64_t h = 0; h < z.H; ++h) out[(p * PANEL + c) * z.H + h] = static_cast<T>(panel[h * width + c]);
  });
}

// ---- from tensors ---------------------------------------------------------------------------------------------------------
// A weight's data after checking its shape; nullptr for an optional one that is absent.
template <typename T>
const T* weight(const std::optional<Tensor>& tensor, const char* name, at::IntArrayRef shape, bool optional) {
  if (optional && !tensor.has_value()) return nullptr;
  TORCH_CHECK_VALUE(tensor.has_value() && tensor->sizes() == shape && tensor->is_contiguous() && tensor->device().is_cpu(),
                    "decode_step: expected ", name, " contiguous on the CPU with shape ", shape, ", got ",
                    tensor.has_value() ? c10::str(tensor->sizes(), " strides ", tensor->strides()) : "None");
  TORCH_CHECK_TYPE(tensor->scalar_type() == c10::CppTypeToScalarType<T>::value, "decode_step: expected ", name, " in the embedding's dtype, got ",
                   tensor->scalar_type());
  return tensor->const_data_ptr<T>();
}

// Which rows of the four products are adapted, and by what; nothing where `adapters` is empty.
template <typename T>
void set_adapters(const c10::List<std::optional<Tensor>>& adapters, at::IntArrayRef slices, const Sizes& z, std::vector<Layer<T>>& layers,
                  std::vector<Slice> (&found)[PRODUCTS]) {
  const int64_t L = layers.size();
  const int64_t in[] = {z.H, z.heads * z.D, z.H, z.F}, out[] = {z.qkv(), z.H, z.up(), z.H};
  TORCH_CHECK_VALUE(adapters.empty() || static_cast<int64_t>(adapters.size()) == 2 * PRODUCTS * L, "decode_step: expected ", 2 * PRODUCTS,
                    " adapter matrices of each of ", L, " layers, got ", adapters.size());
  TORCH_CHECK_VALUE(slices.size() % 3 == 0, "decode_step: expected slices as product, first row, rows");
  int64_t rows[PRODUCTS] = {};
  for (size_t i = 0; i < slices.size(); i += 3) {
    const int64_t product = slices[i], first = slices[i + 1], count = slices[i + 2];
    TORCH_CHECK_VALUE(product >= 0 && product < PRODUCTS && first >= 0 && count > 0 && count <= out[product] - first,
                      "decode_step: the adapted slice of ", count, " rows from ", first, " on is none of product ", product);
    found[product].push_back({first, count});
    rows[product] += count;
  }
  for (int64_t l = 0; l < L && !adapters.empty(); ++l)
    for (int64_t p = 0; p < PRODUCTS; ++p) {
      const std::optional<Tensor> a = adapters.get(2 * (l * PRODUCTS + p)), b = adapters.get(2 * (l * PRODUCTS + p) + 1);
      if (found[p].empty() || !b.has_value()) continue;
      TORCH_CHECK_VALUE(b->dim() == 2, "decode_step: expected an adapter's b of 2 dimensions, got ", b->dim());
      const int64_t r = b->size(1), count = found[p].size();
      layers[l].rank[p] = r;
      layers[l].a[p] = weight<T>(a, "an adapter's a", {count * r, in[p]}, false);
      layers[l].b[p] = weight<T>(b, "an adapter's b", {rows[p], r}, false);
    }
}

template <typename T>
Tensor typed(const Tensor& token_ids, const Tensor& positions, const Tensor& rows, const Tensor& block_table, const Tensor& k_cache,
             const Tensor& v_cache, const std::optional<Tensor>& out_slots, const Tensor& embedding, const std::optional<Tensor>& learned,
             const Tensor& norm, const std::optional<Tensor>& norm_bias, const Tensor& cos, const Tensor& sin, const c10::List<std::optional<Tensor>>& parts,
             at::IntArrayRef windows, at::IntArrayRef ropes, Options options, const c10::List<std::optional<Tensor>>& adapters, at::IntArrayRef slices) {
  TORCH_CHECK_VALUE(token_ids.dim() == 1 && positions.sizes() == token_ids.sizes() && rows.sizes() == token_ids.sizes() && block_table.dim() == 2 &&
                        (!out_slots || out_slots->dim() == 1),
                    "decode_step: expected token_ids, positions and rows [N], block_table [B, M] and out_slots [R], got ", token_ids.sizes(), ", ",
                    positions.sizes(), ", ", rows.sizes(), ", ", block_table.sizes(), out_slots ? c10::str(" and ", out_slots->sizes()) : "");
  TORCH_CHECK_VALUE(embedding.dim() == 2 && k_cache.dim() == 5, "decode_step: expected embedding [V, H] and k_cache [L, blocks, heads, D, S], got ",
                    embedding.sizes(), " and ", k_cache.sizes());
  const int64_t L = windows.size(), H = embedding.size(1), kv_heads = k_cache.size(2), D = k_cache.size(3), S = k_cache.size(4);
  TORCH_CHECK_VALUE(v_cache.sizes() == at::IntArrayRef({k_cache.size(0), k_cache.size(1), kv_heads, S, D}),
                    "decode_step: expected v_cache [L, blocks, heads, S, D] beside a k_cache of ", k_cache.sizes(), ", got ", v_cache.sizes());
  TORCH_CHECK_VALUE(static_cast<int64_t>(parts.size()) == PARTS * L && k_cache.size(0) == L && static_cast<int64_t>(ropes.size()) == L,
                    "decode_step: expected ", int{PARTS}, " parts and a rope of each of ", L, " layers");
  TORCH_CHECK_VALUE(kv_heads > 0 && D > 0 && S > 0, "decode_step: expected a cache with key/value heads, a head dim and slots, got ", k_cache.sizes());
  TORCH_CHECK_VALUE(k_cache.is_contiguous() && v_cache.is_contiguous(), "decode_step: expected contiguous caches; use allocate_cache");
  TORCH_CHECK_VALUE(cos.dim() == 3 && 2 * cos.size(2) <= D, "decode_step: expected cos and sin [tables, positions, pairs] of at most ", D / 2,
                    " pairs, got ", cos.sizes());
  const int64_t tables = cos.size(0), pairs = cos.size(2);
  TORCH_CHECK_VALUE(!learned || learned->dim() == 2, "decode_step: expected position_embedding [positions, ", H, "], got ", learned->sizes());
  Sizes z{H, 0, 0, kv_heads, D, S, pairs, false};
  std::vector<Layer<T>> layers(L);
  int64_t reach = 1;
  for (int64_t l = 0; l < L; ++l) {
    const auto part = [&](Part i) -> std::optional<Tensor> { return parts.get(l * PARTS + i); };
    const auto o = part(O), gate_up = part(GATE_UP), down = part(DOWN);
    TORCH_CHECK_VALUE(o && o->dim() == 2 && gate_up && gate_up->dim() == 2 && down && down->dim() == 2, "decode_step: layer ", l,
                      " lacks its o, gate_up or down weight");
    const int64_t heads = o->size(1) / D, F = down->size(1);
    const bool gated = gate_up->size(0) != F;
    TORCH_CHECK_VALUE(heads > 0 && heads % kv_heads == 0 && (l == 0 || (F == z.F && heads == z.heads && gated == z.gated)),
                      "decode_step: expected layers of one shape and query heads in equal groups, got head dim ", D, ", ", heads, " heads, ", kv_heads,
                      " key/value heads, F ", F, gated ? ", gated" : ", not gated", " in layer ", l);
    z.heads = heads;
    z.F = F;
    z.gated = gated;
    const auto set = [&](Part i, const char* name, at::IntArrayRef shape, bool optional) {
      layers[l].part[i] = weight<T>(part(i), name, shape, optional);
    };
    const auto q_norm = part(Q_NORM);
    const bool together = q_norm && q_norm->numel() != D;
    set(INPUT_NORM, "input_norm", {H}, true);
    set(QKV, "qkv", {z.qkv(), H}, false);
    set(QKV_BIAS, "qkv_bias", {z.qkv()}, true);
    set(Q_NORM, "q_norm", {together ? heads * D : D}, true);
    set(K_NORM, "k_norm", {together ? kv_heads * D : D}, true);
    set(O, "o", {H, heads * D}, false);
    set(O_BIAS, "o_bias", {H}, true);
    set(POST_NORM, "post_norm", {H}, true);
    set(GATE_UP, "gate_up", {z.up(), H}, false);
    set(GATE_UP_BIAS, "gate_up_bias", {z.up()}, true);
    set(DOWN, "down", {H, F}, false);
    set(DOWN_BIAS, "down_bias", {H}, true);
    set(ATTENTION_OUT_NORM, "attention_out_norm", {H}, true);
    set(MLP_OUT_NORM, "mlp_out_norm", {H}, true);
    set(INPUT_NORM_BIAS, "input_norm_bias", {H}, true);
    set(POST_NORM_BIAS, "post_norm_bias", {H}, true);
    TORCH_CHECK_VALUE(ropes[l] >= -1 && ropes[l] < tables, "decode_step: expected a rope of -1 (none) or below the ", tables, " rotary tables, got ",
                      ropes[l], " in layer ", l);
    layers[l].rope = ropes[l];
    layers[l].heads_together = together;
    TORCH_CHECK_VALUE(windows[l] >= 0, "decode_step: expected a window of 0 (all) or more, got ", windows[l], " in layer ", l);
    layers[l].window = windows[l];
    reach = std::max(reach, windows[l] ? windows[l] : std::numeric_limits<int32_t>::max());
  }
  set_adapters(adapters, slices, z, layers, options.slices);
  const Tensor ids_N = token_ids.contiguous(), positions_N = positions.contiguous(), rows_N = rows.contiguous(), table_BM = block_table.contiguous();
  const Tensor slots_R = out_slots ? out_slots->contiguous() : Tensor();
  const int64_t N = ids_N.numel(), R = out_slots ? slots_R.numel() : N;
  const int64_t* slots = out_slots ? slots_R.const_data_ptr<int64_t>() : nullptr;
  const Tokens tokens{ids_N.const_data_ptr<int64_t>(), positions_N.const_data_ptr<int64_t>(), rows_N.const_data_ptr<int64_t>(),
                      table_BM.const_data_ptr<int32_t>(), N, table_BM.size(0), table_BM.size(1)};
  check_ranges(tokens, embedding.size(0), learned ? learned->size(0) : std::numeric_limits<int64_t>::max(), cos.size(1), k_cache.size(1), S, reach, slots,
               out_slots ? R : 0);
  Tensor out_RH = at::empty({R, H}, embedding.options().requires_grad(false));
  const auto over = [&](auto zero) {
    using C = decltype(zero);
    run<T, C>(layers, z, options, tokens,
              {weight<T>(embedding, "embedding", embedding.sizes(), false),
               weight<T>(learned, "position_embedding", {learned ? learned->size(0) : 0, H}, true)},
              {weight<T>(norm, "norm", {H}, false), weight<T>(norm_bias, "norm_bias", {H}, true)},
              {weight<float>(cos, "cos", cos.sizes(), false), weight<float>(sin, "sin", cos.sizes(), false), tables, cos.size(1)},
              k_cache.mutable_data_ptr<C>(), v_cache.mutable_data_ptr<C>(), k_cache.size(1) * kv_heads * D * S, slots, R, out_RH.mutable_data_ptr<T>());
  };
  if (N) k_cache.scalar_type() == at::kFloat ? over(0.0f) : over(T());
  return out_RH;
}

Activation activation_of(c10::string_view name) {
  if (name == "silu") return Activation::SILU;
  if (name == "gelu_tanh") return Activation::GELU_TANH;
  TORCH_CHECK_VALUE(name == "gelu", "decode_step: expected activation silu, gelu_tanh or gelu, got ", name);
  return Activation::GELU;
}

Tensor decode_step(const Tensor& token_ids, const Tensor& positions, const Tensor& rows, const Tensor& block_table, const Tensor& k_cache,
                   const Tensor& v_cache, const std::optional<Tensor>& out_slots, const Tensor& embedding, const std::optional<Tensor>& position_embedding,
                   const Tensor& norm, const std::optional<Tensor>& norm_bias, const Tensor& cos, const Tensor& sin,
                   const c10::List<std::optional<Tensor>>& layers, at::IntArrayRef windows, at::IntArrayRef ropes, double eps,
                   double attention_scale, double attention_softcap, double embedding_scale, double norm_offset, c10::string_view activation,
                   bool parallel, const c10::List<std::optional<Tensor>>& adapters, at::IntArrayRef slices, double adapter_scale) {
  const auto call = embedding.scalar_type() == at::kBFloat16 ? &typed<at::BFloat16> : &typed<float>;
  const auto narrow = [](double x) { return static_cast<float>(x); };
  const Options options{narrow(eps),         narrow(attention_scale),   narrow(attention_softcap), narrow(embedding_scale),
                        narrow(norm_offset), activation_of(activation), parallel,                  narrow(adapter_scale),   {}};
  return call(token_ids, positions, rows, block_table, k_cache, v_cache, out_slots, embedding, position_embedding, norm, norm_bias, cos, sin, layers,
              windows, ropes, options, adapters, slices);
}

TORCH_LIBRARY_FRAGMENT(fusedrl, m) {
  m.def(
      "decode_step(Tensor token_ids, Tensor positions, Tensor rows, Tensor block_table, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? out_slots, "
      "Tensor embedding, Tensor? position_embedding, Tensor norm, Tensor? norm_bias, Tensor cos, Tensor sin, Tensor?[] layers, int[] windows, int[] ropes, "
      "float eps, float attention_scale, float attention_softcap, float embedding_scale, float norm_offset, str activation, "
      "bool parallel, Tensor?[] adapters, int[] slices, float adapter_scale) -> Tensor");
}
TORCH_LIBRARY_IMPL(fusedrl, CPU, m) { m.impl("decode_step", &decode_step); }

}  // namespace
