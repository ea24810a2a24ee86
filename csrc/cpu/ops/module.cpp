// The Python module that carries the ops. Importing it loads the library; each op's file registers itself with TORCH_LIBRARY_FRAGMENT.
#include <Python.h>

#include "fusedrl_sources.h"  // FUSEDRL_SOURCES, written by setup.py

#define FUSEDRL_CONCAT_(a, b) a##b
#define FUSEDRL_CONCAT(a, b) FUSEDRL_CONCAT_(a, b)
#define FUSEDRL_STRING_(a) #a
#define FUSEDRL_STRING(a) FUSEDRL_STRING_(a)

extern "C" PyMODINIT_FUNC FUSEDRL_CONCAT(PyInit_, FUSEDRL_MODULE)(void) {
  static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, FUSEDRL_STRING(FUSEDRL_MODULE), nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* made = PyModule_Create(&module);
  if (made && PyModule_AddStringConstant(made, "sources", FUSEDRL_SOURCES) != 0) Py_CLEAR(made);
  return made;
}
