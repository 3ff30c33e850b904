// The operators and the whole step. This file is compiled once for each instruction set, whose name is FASTGPT2_ISA.
#include <time.h>
#include "attention.h"
#include "linear.h"
#include "sampling.h"

namespace {

// Applies LayerNorm, if there is one, and makes the operands of some rows. Every thread may read the result. If there are
// few rows, every thread prepares all of them for itself, which costs less than a barrier.
Operands prepare(const Linear* to, const LayerNorm* norm, Source from, int64_t rows, Operands shared, char* scratch, Team us) {
  const bool is_private = rows <= PRIVATE_ROWS;
  const int64_t place = is_private ? us.thread * PRIVATE_ROWS : 0;
  Operands own = {shared.data + place * operand_stride(to->type, to->k), shared.scale + place};
  const Share mine = is_private ? Share{0, rows} : share(rows, us.thread, us.threads);
  // Other threads have written these rows, so all cache lines are prefetched at once.
  for (int64_t r = mine.first; r < mine.last; ++r)
    for (int64_t k = 0; k < to->k; k += 16) __builtin_prefetch(row_of(from, r) + k, 0, 2);
  for (int64_t r = mine.first; r < mine.last; ++r) prepare_row(to, norm, from, r, own, (float*)scratch);
  if (!is_private) barrier(us);
  return own;
}

const char* layout(LayoutArgs* a) {
  a->panel = NR;
  for (int64_t type = 0; type < 3; ++type) a->group[type] = group_of(type), a->operand[type] = operand_bytes(type);
  a->row_padding = ROW_PADDING;
  a->key_split = KEY_SPLIT, a->private_rows = PRIVATE_ROWS;
  int64_t bytes = most(sampling_scratch(a->vocab), attention_scratch(a->positions, a->head_size));
  bytes = most(bytes, most((int64_t)CHUNK_ROWS * NR, a->width + 64) * 4);
  a->scratch_bytes = round_up(bytes, 4096) + 64;
  return nullptr;
}

const char* pack(PackArgs* a) {
  in_parallel(a->threads, [&](Team us) { pack_share(a, share(panels_of(a->n), us.thread, us.threads)); });
  return nullptr;
}

const char* linear(LinearArgs* a) {
  in_parallel(a->threads, [&](Team us) {
    char* scratch = a->scratch + a->scratch_bytes * us.thread;
    const Operands x = prepare(&a->linear, a->layer_norm, {a->x, a->x_stride, nullptr}, a->rows,
                               {a->operand, a->operand_scale}, scratch, us);
    linear_share(&a->linear, x, a->rows, &a->to, scratch, us);
  });
  return nullptr;
}

// This thread's share of one layer's attention.
void attend(const Attention* a, bool has_blocks, char* scratch, Team us) {
  if (a->cache->type == BF16) attend_tasks<uint16_t>(a, has_blocks, (float*)scratch, us);
  else attend_tasks<float>(a, has_blocks, (float*)scratch, us);
}

const char* attention(AttentionArgs* a) {
  const bool has_blocks = plan_tasks(a->attention.cache, a->attention.rows, a->attention.heads);
  in_parallel(a->threads, [&](Team us) {
    attend(&a->attention, has_blocks, a->scratch + a->scratch_bytes * us.thread, us);
  });
  return nullptr;
}

const char* sample(SampleArgs* a) {
  for (int64_t r = 0; r < a->rows; ++r)
    if (a->slots[r] < 0 || a->slots[r] >= a->state.num_slots) return "a slot is out of range";
  in_parallel(a->threads, [&](Team us) {
    char* scratch = a->scratch + a->scratch_bytes * us.thread;
    for (int64_t r; (r = take(us, a->rows)) >= 0;) sample_row(a, r, (float*)scratch);
  });
  return nullptr;
}

// A slot's row in the next step. A row that is RUNNING has appended a token and chosen another since its counts were set.
struct Next { int32_t past, produced; bool goes_on; };
Next next_of(const ForwardArgs* a, int32_t slot) {
  const Slots* state = &a->state;
  const int32_t went_on = state->status[slot] == RUNNING;
  const int32_t past = state->lengths[slot] + went_on, produced = state->produced[slot] + went_on;
  bool goes_on = state->status[slot] != IDLE && produced < state->limits[slot] && past < a->context;
  for (int64_t i = 0; i < a->num_stops; ++i) goes_on = goes_on && a->stop_ids[i] != state->tokens[slot];
  return {past, produced, goes_on};
}

// Sets the rows of a step: those that go on, with one token each.
void begin_step(ForwardArgs* a) {
  int64_t active = 0;
  for (int64_t r = 0; r < a->rows.num_rows; ++r) {
    const int32_t slot = a->rows.slots[r];
    const Next next = next_of(a, slot);
    a->state.lengths[slot] = next.past;
    a->state.produced[slot] = next.produced;
    a->state.status[slot] = next.goes_on ? RUNNING : IDLE;
    if (!next.goes_on) continue;
    a->active[active] = slot;
    a->rows.starts[active] = (int32_t)active;
    a->rows.counts[active] = 1;
    a->rows.pasts[active++] = next.past;
  }
  a->rows.slots = a->active;
  a->rows.num_rows = a->rows.num_tokens = active;
}

// Records the tokens that a step chose. Another step follows if more were asked for and no row has ended.
void end_step(ForwardArgs* a) {
  const int64_t at = a->steps_done++ * a->state.num_slots;
  a->more = a->steps_done < a->steps;
  for (int64_t r = 0; r < a->rows.num_rows; ++r) {
    const int32_t slot = a->rows.slots[r];
    a->step_tokens[at + slot] = a->state.tokens[slot];
    a->step_logprobs[at + slot] = a->state.logprobs[slot];
    a->more = a->more && next_of(a, slot).goes_on;
  }
}

// The sum of the token's and the position's embedding; NaN for a token or position out of range.
void embed(const ForwardArgs* a, int64_t r, Team us) {
  for (int64_t i = 0; i < a->rows.counts[r]; ++i) {
    const int64_t n = a->rows.starts[r] + i, position = a->rows.pasts[r] + i;
    if (n % us.threads != us.thread) continue;
    const int64_t token = a->token_ids ? a->token_ids[n] : a->state.tokens[a->rows.slots[r]];
    const bool is_good = token >= 0 && token < a->vocab && position >= 0 && position < a->context;
    const auto number = [a](const void* table, int64_t at) {
      const uint32_t bits = a->embedding_type == F32 ? ((const uint32_t*)table)[at] : (uint32_t)((const uint16_t*)table)[at] << 16;
      return load_as<float>(&bits);
    };
    for (int64_t c = 0; c < a->width; ++c)
      a->x[n * a->width + c] = !is_good ? __builtin_nanf("") : number(a->wte, token * a->wte_stride + c) +
                                                                   number(a->wpe, position * a->wpe_stride + c);
  }
}

// At the end of a phase, the first thread adds its time to ForwardArgs.times.
enum Phase { EMBEDDING, OPERANDS, QKV, ATTENTION, LINEAR_LAYERS, HEAD, SAMPLING, WAITING };
INLINE void mark(const ForwardArgs* a, Team us, Phase phase, double* since) {
  if (!a->times || us.thread != 0) return;
  timespec at;
  clock_gettime(CLOCK_MONOTONIC, &at);
  const double now = (double)at.tv_sec + 1e-9 * (double)at.tv_nsec;
  if (*since > 0.0) a->times[phase] += now - *since;
  *since = now;
}

void forward_team(const ForwardArgs* a, int32_t* last_tokens, bool has_blocks, Team us) {
  const int64_t N = a->rows.num_tokens, R = a->rows.num_rows, C = a->width;
  char* scratch = a->scratch + a->scratch_bytes * us.thread;
  const Operands operand = {a->operand, a->operand_scale}, operand_2 = {a->operand_2, a->operand_scale};
  double since = 0.0;
  const auto meet_after = [&](Phase phase) { mark(a, us, phase, &since), barrier(us), mark(a, us, WAITING, &since); };
  mark(a, us, EMBEDDING, &since);
  for (int64_t r = 0; r < R; ++r) embed(a, r, us);
  meet_after(EMBEDDING);
  // If there is no source, the operands are already there.
  const auto product = [&](const Linear& linear, const LayerNorm* norm, Source from, int64_t rows, Operands own,
                           const Epilogue& to, Phase phase) {
    const Operands x = from.x ? prepare(&linear, norm, from, rows, own, scratch, us) : own;
    mark(a, us, OPERANDS, &since);
    linear_share(&linear, x, rows, &to, scratch, us);
    meet_after(phase);
  };
  for (int64_t i = 0; i < a->num_layers; ++i) {
    const Layer* layer = a->layers + i;
    const int64_t type = layer->qkv.type;
    float* plain = type == I8 ? a->hidden : nullptr;  // an int8 row can only be quantized once it is complete
    const Epilogue to_qkv = {LINEAR, nullptr, 0, a->qkv, 3 * C, nullptr, F32, 0};
    const Epilogue to_x = {LINEAR, a->x, C, a->x, C, nullptr, F32, 0};
    const Epilogue to_hidden = {a->activation, nullptr, 0, plain, a->inner, operand_2.data, type, operand_stride(type, a->inner)};
    const Attention attention = {&a->cache, &a->rows, i, a->heads, C / a->heads, layer->attention_scale, a->qkv,
                                 3 * C, a->parts, plain, C, operand.data, type, operand_stride(type, C)};
    product(layer->qkv, &layer->ln_1, {a->x, C, nullptr}, N, operand, to_qkv, QKV);
    attend(&attention, has_blocks, scratch, us);
    meet_after(ATTENTION);
    product(layer->projection, nullptr, {plain, C, nullptr}, N, operand, to_x, LINEAR_LAYERS);
    product(layer->up, &layer->ln_2, {a->x, C, nullptr}, N, operand, to_hidden, LINEAR_LAYERS);
    product(layer->down, nullptr, {plain, a->inner, nullptr}, N, operand_2, to_x, LINEAR_LAYERS);
  }
  const Epilogue to_logits = {LINEAR, nullptr, 0, a->logits, a->logits_stride, nullptr, F32, 0};
  product(a->head, &a->ln_f, {a->x, C, last_tokens}, R, operand, to_logits, HEAD);
  if (a->token_ids) return;
  const SampleArgs choice = {a->state, a->sampling, a->logits, a->rows.slots, nullptr, R, a->vocab, a->logits_stride, 0, 0};
  for (int64_t r; (r = take(us, R)) >= 0;) sample_row(&choice, r, (float*)scratch);
  meet_after(SAMPLING);
}

const char* forward(ForwardArgs* given) {
  ForwardArgs a = *given;
  if (!a.token_ids) {
    for (int64_t r = 0; r < a.rows.num_rows; ++r)
      if (a.rows.slots[r] < 0 || a.rows.slots[r] >= a.state.num_slots) return "a slot is out of range";
    begin_step(&a);
  }
  if (a.rows.num_rows > 0) {
    const bool has_blocks = plan_tasks(&a.cache, &a.rows, a.heads);
    // Logits are computed only for the last token of a row.
    int32_t* last_tokens = a.token_ids ? a.active : nullptr;
    for (int64_t r = 0; last_tokens && r < a.rows.num_rows; ++r) last_tokens[r] = a.rows.starts[r] + a.rows.counts[r] - 1;
    in_parallel(a.threads, [&](Team us) { forward_team(&a, last_tokens, has_blocks, us); });
  }
  if (!a.token_ids) end_step(given);
  return nullptr;
}

const char* call(int64_t operation, void* arguments) {
  switch (operation) {
    case OP_LAYOUT: return layout((LayoutArgs*)arguments);
    case OP_PACK: return pack((PackArgs*)arguments);
    case OP_LINEAR: return linear((LinearArgs*)arguments);
    case OP_ATTENTION: return attention((AttentionArgs*)arguments);
    case OP_SAMPLE: return sample((SampleArgs*)arguments);
    case OP_FORWARD: return forward((ForwardArgs*)arguments);
    default: return "there is no such operation";
  }
}

}  // namespace

#define TEXT_OF(name) #name
#define TEXT(name) TEXT_OF(name)
#define TABLE_OF(name) fastgpt2_kernels_##name
#define TABLE(name) TABLE_OF(name)
extern "C" const Kernels TABLE(FASTGPT2_ISA);
extern "C" const Kernels TABLE(FASTGPT2_ISA) = {TEXT(FASTGPT2_ISA), call};
