// The arguments that Python passes to the kernels. Every field is 8 bytes wide, so structs.py mirrors a struct field by field.
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

// How the chosen instruction set lays out data. The caller fills in the last four fields, on which scratch_bytes depends.
struct LayoutArgs {
  int64_t panel;           // outputs in a panel of packed weights
  int64_t group[3];        // how many products one step adds, by WeightType; K is padded to a multiple of it
  int64_t operand[3];      // bytes of one number in a row of operands, by WeightType
  int64_t row_padding;     // a row of operands is rounded up to 64 bytes, and this is added
  int64_t key_split;       // keys in one part of a row's attention
  int64_t private_rows;    // up to this many rows, every thread prepares all operands for itself
  int64_t scratch_bytes;   // scratch memory of each thread
  int64_t vocab, positions, head_size, width;  // width: the largest K
};

// bias and scale are float32, sums int32, all padded with zeros to whole panels; bias may be null.
struct Linear {
  const void* weight;
  const float* bias;
  const float* scale;   // I8: the scale of every output
  const int32_t* sums;  // I8: what the offset of the operands adds to every output
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
  const void* source;  // (n, k), of type `type`
  void* packed;
  int32_t* sums;
  int64_t n, k, type, source_stride, threads;
};

// What is done with the sums of a product. If out is null, the results become the operand of the next product.
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
  char* operand;         // max(rows, threads * private_rows) rows of operands
  float* operand_scale;  // one for each of them
  char* scratch;
  int64_t rows, x_stride, threads, scratch_bytes;
};

// The cache of all layers, float32 or bfloat16. Positions and head elements are contiguous. Strides are in elements.
struct Cache {
  void *keys, *values;
  int64_t layer_stride, slot_stride, head_stride, slots, capacity, type;
};

// Row r has counts[r] new tokens, from token starts[r] on. Its cache slot slots[r] already holds pasts[r] tokens.
struct Rows {
  int64_t num_rows, num_tokens;
  const int32_t* slots;
  int32_t *starts, *counts, *pasts;
  int32_t* tasks;   // (R + 1,), running sums of the attention tasks per row
  int32_t* done;    // (R * H,), how many parts of a head are done; zeros at first
};

// The attention of one layer. If out is null, the results become the operand of the next product.
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

// The settings of every slot. Null turns a filter off; a null temperature means greedy.
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

// A step, if token_ids is null: the slots' state says what the rows are. Else a prefill: rows and token_ids say it.
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
  float* hidden;          // (N, max(C, inner)), only for int8: numbers that are not quantized yet
  char *operand, *operand_2;  // a row of operands for each token, or private_rows for each thread
  float* operand_scale;
  float* parts;
  float* logits;          // (R, V)
  int32_t* active;        // (R,)
  char* scratch;
  int64_t logits_stride, threads, scratch_bytes;
  double* times;          // (8,) seconds of each phase; the last one is waiting for other threads. Or null
  // Of steps: how many to run at most, how many have run, and whether another follows. They stop when a row ends.
  int64_t steps, steps_done, more;
  int32_t* step_tokens;   // (steps, slots), the tokens that each step chose
  float* step_logprobs;
};

struct Kernels {
  const char* name;
  const char* (*call)(int64_t operation, void* arguments);  // returns null, or an error message
};
extern const int64_t ARGUMENT_BYTES[NUM_OPS];
