/* In place of mypyc's function of the same use; see traceback.c. */
void mmufuzz_add_traceback(const char *file, const char *function, int line, PyObject *globals);
#define CPy_AddTraceback mmufuzz_add_traceback
