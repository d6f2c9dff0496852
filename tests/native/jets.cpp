// A function of a template's type of numbers, with derivatives by jets.
#include <jetplane/jet.hpp>
template <class T> T energy(const T *x, int n) {
    using namespace std;
    T s = 1.0;
    for (int i = 0; i + 1 < n; i++)
        s += exp(-x[i] * x[i]) * sin(x[i + 1]) / (1.0 + x[i] * x[i]) + log(1.5 + x[i + 1]) * sqrt(2.0 + x[i]) - tanh(x[i]) * cos(x[i + 1])
           + pow(1.0 + x[i] * x[i], x[i + 1]) + pow(x[i], 3.0) + atan2(x[i], x[i + 1] + 3.0) + fabs(x[i]) * erf(x[i + 1]);
    return s * s;
}
extern "C" double f(const double *x, int n) { return energy(x, n); }
extern "C" double f_jvp(const double *x, const double *v, int n) {
    return jetplane::along(x, v, n, [&](const jetplane::jet<1> *y) { return energy(y, n); });
}
extern "C" double f_second(const double *x, const double *v, const double *w, int n) {
    return jetplane::along2(x, v, w, n, [&](const jetplane::jet<2> *y) { return energy(y, n); });
}
