// libnvinfer, its plugins and its parser, forwarded to TensorRT for RTX: with it the real Python bindings of `tensorrt`
// are imported without their libraries, and those of version 11, whose ABI is the same, build plans.
// RTX_LIBRARY and RTX_PARSER in the environment name TensorRT for RTX's files.
#include <dlfcn.h>
#include <stdlib.h>

#define FIND(file, name) dlsym(dlopen(getenv(file), RTLD_NOW), name)
#define VERSION(file, name) ((int (*)(void))FIND(file, name))()

void* createInferBuilder_INTERNAL(void* logger, int version) {
    version = VERSION("RTX_LIBRARY", "getInferLibVersion");
    return ((void* (*)(void*, int))FIND("RTX_LIBRARY", "createInferBuilder_INTERNAL"))(logger, version);
}
void* createInferRuntime_INTERNAL(void* logger, int version) {
    version = VERSION("RTX_LIBRARY", "getInferLibVersion");
    return ((void* (*)(void*, int))FIND("RTX_LIBRARY", "createInferRuntime_INTERNAL"))(logger, version);
}
void* createNvOnnxParser_INTERNAL(void* network, void* logger, int version) {
    version = VERSION("RTX_PARSER", "getNvOnnxParserVersion");
    return ((void* (*)(void*, void*, int))FIND("RTX_PARSER", "createNvOnnxParser_INTERNAL"))(network, logger, version);
}
void* createInferRefitter_INTERNAL(void* engine, void* logger, int version) { return 0; }
void* createNvOnnxParserRefitter_INTERNAL(void* refitter, void* logger, int version) { return 0; }
void* getBuilderPluginRegistry(int capability) {
    return ((void* (*)(int))FIND("RTX_LIBRARY", "getBuilderPluginRegistry"))(capability);
}
void* getPluginRegistry(void) { return ((void* (*)(void))FIND("RTX_LIBRARY", "getPluginRegistry"))(); }
void* getLogger(void) { return ((void* (*)(void))FIND("RTX_LIBRARY", "getLogger"))(); }
int getInferLibVersion(void) { return VERSION("RTX_LIBRARY", "getInferLibVersion"); }
int getNvOnnxParserVersion(void) { return VERSION("RTX_PARSER", "getNvOnnxParserVersion"); }
int initLibNvInferPlugins(void* logger, const char* space) { return 1; }
