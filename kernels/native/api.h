// What Python hands to the kernels. Every field is 8 bytes wide, so that decode.py can mirror a struct field by field.
// Dimension key: R rows, N new tokens of all rows, L layers, H heads, D head size, C width, V vocabulary, S positions.
#pragma once
#include <stdint.h>

enum WeightType : int64_t { F32 = 0, BF16 = 1, I8 = 2 };
enum Activation : int64_t {
  LINEAR, GELU_TANH, SILU, QUICK_GELU, GELU, GELU_10, LAPLACE, SIGMOID, TANH, MISH, RELU, RELU2, RELU6, LEAKY_RELU,
  HARDSWISH
};
enum Operation : int64_t { OP_LAYOUT, OP_PACK, OP_LINEAR, OP_ATTENTION, OP_SAMPLE, OP_FORWARD, NUM_OPS };

// A status of a slot; the values are those of fastgpt2_kernels' IDLE, FRESH, RUNNING.
enum Status : int32_t { IDLE = 0, FRESH = 1, RUNNING = 2 };

// How the chosen instruction set lays data out. The last four tell what the caller wants to know it for.
struct LayoutArgs {
  int64_t panel;           // outputs of a panel of packed weights
  int64_t group[3];        // products that one step adds up, by WeightType: K is padded to a multiple
  int64_t operand[3];      // bytes of one number of an operand's row
  int64_t row_padding;     // rows of an operand lie at multiples of 64 bytes, plus this
  int64_t key_split;       // keys of one part of a row's attention
  int64_t private_rows;    // up to so many rows every thread prepares operands by itself
  int64_t scratch_bytes;   // of every thread
  int64_t vocab, positions, head_size, width;  // width: the largest K
};

// bias and scale are float32, sums int32, all padded with zeros to whole panels; bias may be null.
struct Linear {
  const void* weight;
  const float* bias;
  const float* scale;   // I8: of every output
  const int32_t* sums;  // I8: what the operand's offset adds to every output
  int64_t n, k, type;
};
struct LayerNorm { const float *weight, *bias; double eps; };
struct Layer {
  LayerNorm ln_1;
  Linear qkv, projection;
  LayerNorm ln_2;
  Linear up, down;
  double attention_scale;
};

struct PackArgs {
  const void* source;  // (n, k) of the same type
  void* packed;
  int32_t* sums;
  int64_t n, k, type, source_stride, threads;
};

// What becomes of a product's sums. out null: the results are the operand of the next product.
struct Epilogue {
  int64_t activation;
  const float* residual;
  int64_t residual_stride;
  float* out;
  int64_t out_stride;
  char* operand;
  int64_t operand_type, operand_stride;
};

struct LinearArgs {
  Linear linear;
  Epilogue to;
  const float* x;  // (rows, k)
  const LayerNorm* layer_norm;
  char* operand;         // rows of operands: max(rows, threads * private_rows)
  float* operand_scale;  // as many
  char* scratch;
  int64_t rows, x_stride, threads, scratch_bytes;
};

// The cache of all layers, float32 or bfloat16: positions and head elements are contiguous, the other strides are in elements.
struct Cache {
  void *keys, *values;
  int64_t layer_stride, slot_stride, head_stride, slots, capacity, type;
};

// Row r has counts[r] new tokens from token starts[r] on; slots[r] holds pasts[r] tokens already.
struct Rows {
  int64_t num_rows, num_tokens;
  const int32_t* slots;
  int32_t *starts, *counts, *pasts;
  int32_t* tasks;   // (R + 1,), what attention deals out
  int32_t* done;    // (R * H,), zeros: parts that are ready
};

// One layer's attention. out null: the results are the operand of the next product.
struct Attention {
  const Cache* cache;
  const Rows* rows;
  int64_t layer, heads, head_size;
  double scale;
  const float* qkv;  // (N, 3C)
  int64_t qkv_stride;
  float* parts;  // (R, H, ceil(capacity / key_split), round_up(D, 16) + 16)
  float* out;    // (N, C)
  int64_t out_stride;
  char* operand;
  int64_t operand_type, operand_stride;
};
struct AttentionArgs { Attention attention; char* scratch; int64_t threads, scratch_bytes; };

struct Slots {
  int32_t *tokens, *status, *lengths, *produced, *limits;
  int64_t* keys;
  float* logprobs;
  int64_t num_slots;
};

// Of every slot; null where a filter is off, temperature null is greedy.
struct Sampling {
  const float* temperature;
  const int32_t* top_k;
  const float *top_p, *min_p, *penalty;
  uint8_t* seen;
  int64_t seen_stride;
};

struct SampleArgs {
  Slots state;
  Sampling sampling;
  const float* logits;
  const int32_t* slots;
  char* scratch;
  int64_t rows, vocab, logits_stride, threads, scratch_bytes;
};

// A step (token_ids null: the slots' state says what the rows are) or a prefill (rows and token_ids say it).
struct ForwardArgs {
  const Layer* layers;
  int64_t num_layers;
  LayerNorm ln_f;
  Linear head;
  const void *wte, *wpe;
  int64_t embedding_type, wte_stride, wpe_stride;
  int64_t vocab, width, context, heads, inner, activation;
  Slots state;
  Sampling sampling;
  const int32_t* stop_ids;
  int64_t num_stops;
  Cache cache;
  Rows rows;
  const int64_t* token_ids;
  float* x;               // (N, C), the residual stream
  float* qkv;             // (N, 3C)
  float* hidden;          // (N, max(C, inner)): int8 only, what is yet to be quantized
  char *operand, *operand_2;  // a row of operands for each token, or private_rows for each thread
  float* operand_scale;
  float* parts;
  float* logits;          // (R, V)
  int32_t* active;        // (R,)
  char* scratch;
  int64_t logits_stride, threads, scratch_bytes;
  double* times;          // (8,) seconds of the phases, waiting for other threads the last; or null
  // Of steps: how many at most, while no row ends; how many have run; whether another is to follow.
  int64_t steps, steps_done, more;
  int32_t* step_tokens;   // (steps, slots), what each of them chose
  float* step_logprobs;
};

struct Kernels {
  const char* name;
  const char* (*call)(int64_t operation, void* arguments);  // null, or what is wrong
};
extern const int64_t ARGUMENT_BYTES[NUM_OPS];
