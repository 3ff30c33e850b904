// The Python module. It lists the instruction sets that were compiled, and calls the kernels of one of them.
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include "api.h"

const int64_t ARGUMENT_BYTES[NUM_OPS] = {sizeof(LayoutArgs),    sizeof(PackArgs),   sizeof(LinearArgs),
                                         sizeof(AttentionArgs), sizeof(SampleArgs), sizeof(ForwardArgs)};

#define DECLARE(name) extern "C" const Kernels fastgpt2_kernels_##name;
FASTGPT2_ISAS(DECLARE)

namespace {

// The best first.
#define ENTRY(name) &fastgpt2_kernels_##name,
const Kernels* const TABLES[] = {FASTGPT2_ISAS(ENTRY)};

// Whether this processor and its operating system support the instruction set.
bool is_usable(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!__builtin_strcmp(name, "avx2")) return avx2;
  if (!__builtin_strcmp(name, "avx512")) return avx512;
  if (!__builtin_strcmp(name, "avx512_bf16"))
    return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  return false;
#else
  return !__builtin_strcmp(name, "neon");
#endif
}

// isas() -> list of (name, whether this processor has it), the best first.
PyObject* isas(PyObject*, PyObject*) {
  PyObject* list = PyList_New(0);
  for (const Kernels* table : TABLES) {
    PyObject* item = list ? Py_BuildValue("(sO)", table->name, is_usable(table->name) ? Py_True : Py_False) : nullptr;
    if (!item || PyList_Append(list, item) < 0) {
      Py_XDECREF(item);
      Py_XDECREF(list);
      return nullptr;
    }
    Py_DECREF(item);
  }
  return list;
}

// call(isa, operation, address, bytes), with the struct of arguments at `address`. Other Python threads can run meanwhile.
// An interrupt ends a run of steps between two steps.
PyObject* call(PyObject*, PyObject* args) {
  const char* isa;
  long long operation, address, bytes;
  if (!PyArg_ParseTuple(args, "sLLL", &isa, &operation, &address, &bytes)) return nullptr;
  const Kernels* table = nullptr;
  for (const Kernels* other : TABLES)
    if (!__builtin_strcmp(other->name, isa) && is_usable(isa)) table = other;
  if (!table) return PyErr_Format(PyExc_ValueError, "this processor cannot run %s", isa);
  if (operation < 0 || operation >= NUM_OPS || bytes != ARGUMENT_BYTES[operation])
    return PyErr_Format(PyExc_RuntimeError, "operation %lld does not take %lld bytes of arguments: the extension and its "
                                            "Python side are of different versions; install fastgpt2 again", operation, bytes);
  const char* error;
  do {
    if (PyErr_CheckSignals() < 0) return nullptr;
    Py_BEGIN_ALLOW_THREADS
    error = table->call(operation, (void*)(intptr_t)address);
    Py_END_ALLOW_THREADS
    if (error) return PyErr_Format(PyExc_ValueError, "%s", error);
  } while (operation == OP_FORWARD && ((ForwardArgs*)(intptr_t)address)->more);
  Py_RETURN_NONE;
}

PyMethodDef METHODS[] = {{"isas", isas, METH_NOARGS, nullptr}, {"call", call, METH_VARARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "_native", nullptr, -1, METHODS, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() { return PyModule_Create(&MODULE); }
