/* Frames of tracebacks, with code objects that are kept.
 *
 * mypyc's CPy_AddTraceback makes a code object for each frame that an exception leaves. In the model exceptions are
 * ordinary: a guest's page fault passes half a dozen frames, and making and freeing their code objects was 5 % of a run.
 */

#include <Python.h>
#include <frameobject.h>

#include "traceback.h"

#define PLACES 4096

static struct {
    const char *function;
    int line;
    PyCodeObject *code;
} places[PLACES];

/* The code object of a place. Both names are literals, so that their addresses tell them apart. */
static PyCodeObject *code_at(const char *file, const char *function, int line) {
    size_t slot = (((uintptr_t)function >> 3) * 31 + (size_t)line) % PLACES;
    if (places[slot].code == NULL || places[slot].function != function || places[slot].line != line) {
        PyCodeObject *code = PyCode_NewEmpty(file, function, line);
        if (code == NULL) {
            return NULL;
        }
        Py_XDECREF(places[slot].code);
        places[slot].function = function;
        places[slot].line = line;
        places[slot].code = code;
    }
    return places[slot].code;
}

void mmufuzz_add_traceback(const char *file, const char *function, int line, PyObject *globals) {
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyCodeObject *code = code_at(file, function, line);
    PyFrameObject *frame = code == NULL ? NULL : PyFrame_New(PyThreadState_Get(), code, globals, NULL);
    if (frame == NULL) {
        PyErr_Clear(); /* The exception matters more than the line it came from. */
    }
    PyErr_Restore(type, value, traceback);
    if (frame != NULL) {
        PyTraceBack_Here(frame);
        Py_DECREF(frame);
    }
}
