// A row of logits as a model gave them, and what its sampling takes off them.
#pragma once
#include <cstdint>

struct Logits {
    const void* x;
    int64_t bits, size;   // 32: float32, 16: bfloat16; how many
    const int32_t* ids;   // the tokens that were said, each once, ascending
    const int32_t* times;  // how often in the reply
    int64_t count;
    float repetition, presence, frequency;  // inference/params.py
};
