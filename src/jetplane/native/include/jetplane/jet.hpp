// Jets for C++14: a double with its first and second derivatives along K directions.
//
//     jetplane::jet<K> x;   x.value, x.first[i], x.second(i, j)
//
// f(x) has the coefficients f' x_i and f' x_ij + f'' x_i x_j; a product x_i y + x y_i and
// x_ij y + x y_ij + x_i y_j + x_j y_i. Coefficients are derivatives, without factorials.
//
// Write the function as a template of its type of numbers, and instantiate it for double and for jets:
//
//     template <class T> T energy(const T* x, int n);
//     extern "C" double f(const double* x, int n) { return energy(x, n); }
//     extern "C" double f_jvp(const double* x, const double* v, int n) {
//         return jetplane::along(x, v, n, [&](const jetplane::jet<1>* y) { return energy(y, n); });
//     }
//     extern "C" double f_second(const double* x, const double* v, const double* w, int n) {
//         return jetplane::along2(x, v, w, n, [&](const jetplane::jet<2>* y) { return energy(y, n); });
//     }
//
// and hand these to jetplane.register_native(f, "double(const double[n] in, int n)", jvp=f_jvp, second=f_second).
#ifndef JETPLANE_JET_HPP
#define JETPLANE_JET_HPP

#include <cmath>
#include <vector>

namespace jetplane {

template <int K>
struct jet {
    static constexpr int pairs = K * (K + 1) / 2;
    double value = 0;
    double first[K] = {};
    double pair[pairs] = {};

    jet() = default;
    jet(double x) : value(x) {}  // a constant

    static int place(int i, int j) { return i <= j ? i * (2 * K - i - 1) / 2 + j : place(j, i); }
    double second(int i, int j) const { return pair[place(i, j)]; }

    // f(x), by f, f' and f'' at x
    jet chain(double f, double d1, double d2) const {
        jet y(f);
        for (int i = 0; i < K; ++i) {
            y.first[i] = d1 * first[i];
            for (int j = i; j < K; ++j)
                y.pair[place(i, j)] = d1 * pair[place(i, j)] + d2 * first[i] * first[j];
        }
        return y;
    }

    jet& operator+=(const jet& y) { return *this = *this + y; }
    jet& operator-=(const jet& y) { return *this = *this - y; }
    jet& operator*=(const jet& y) { return *this = *this * y; }
    jet& operator/=(const jet& y) { return *this = *this / y; }
    jet operator-() const { return chain(-value, -1, 0); }
    jet operator+() const { return *this; }

    friend jet operator+(jet x, const jet& y) {
        x.value += y.value;
        for (int i = 0; i < K; ++i) x.first[i] += y.first[i];
        for (int n = 0; n < pairs; ++n) x.pair[n] += y.pair[n];
        return x;
    }
    friend jet operator-(jet x, const jet& y) {
        x.value -= y.value;
        for (int i = 0; i < K; ++i) x.first[i] -= y.first[i];
        for (int n = 0; n < pairs; ++n) x.pair[n] -= y.pair[n];
        return x;
    }
    friend jet operator*(const jet& x, const jet& y) {
        jet z(x.value * y.value);
        for (int i = 0; i < K; ++i) {
            z.first[i] = x.first[i] * y.value + x.value * y.first[i];
            for (int j = i; j < K; ++j) {
                const int n = place(i, j);
                z.pair[n] = x.pair[n] * y.value + x.value * y.pair[n] + x.first[i] * y.first[j] + x.first[j] * y.first[i];
            }
        }
        return z;
    }
    friend jet operator/(const jet& x, const jet& y) {
        jet z(x.value / y.value);
        for (int i = 0; i < K; ++i) z.first[i] = (x.first[i] - z.value * y.first[i]) / y.value;
        for (int i = 0; i < K; ++i)
            for (int j = i; j < K; ++j) {
                const int n = place(i, j);
                z.pair[n] = (x.pair[n] - z.value * y.pair[n] - z.first[i] * y.first[j] - z.first[j] * y.first[i]) / y.value;
            }
        return z;
    }
    friend bool operator<(const jet& x, const jet& y) { return x.value < y.value; }
    friend bool operator>(const jet& x, const jet& y) { return x.value > y.value; }
    friend bool operator<=(const jet& x, const jet& y) { return x.value <= y.value; }
    friend bool operator>=(const jet& x, const jet& y) { return x.value >= y.value; }
    friend bool operator==(const jet& x, const jet& y) { return x.value == y.value; }
    friend bool operator!=(const jet& x, const jet& y) { return x.value != y.value; }
};

template <int K> jet<K> sqrt(const jet<K>& x) { const double f = std::sqrt(x.value); return x.chain(f, 0.5 / f, -0.25 / (f * x.value)); }
template <int K> jet<K> cbrt(const jet<K>& x) {
    const double f = std::cbrt(x.value), d = 1 / (3 * f * f);
    return x.chain(f, d, -2 * d / (3 * x.value));
}
template <int K> jet<K> exp(const jet<K>& x) { const double f = std::exp(x.value); return x.chain(f, f, f); }
template <int K> jet<K> expm1(const jet<K>& x) { const double d = std::exp(x.value); return x.chain(std::expm1(x.value), d, d); }
template <int K> jet<K> log(const jet<K>& x) { const double d = 1 / x.value; return x.chain(std::log(x.value), d, -d * d); }
template <int K> jet<K> log1p(const jet<K>& x) { const double d = 1 / (1 + x.value); return x.chain(std::log1p(x.value), d, -d * d); }
template <int K> jet<K> sin(const jet<K>& x) { const double s = std::sin(x.value); return x.chain(s, std::cos(x.value), -s); }
template <int K> jet<K> cos(const jet<K>& x) { const double c = std::cos(x.value); return x.chain(c, -std::sin(x.value), -c); }
template <int K> jet<K> tan(const jet<K>& x) { const double f = std::tan(x.value), d = 1 + f * f; return x.chain(f, d, 2 * f * d); }
template <int K> jet<K> sinh(const jet<K>& x) { const double s = std::sinh(x.value); return x.chain(s, std::cosh(x.value), s); }
template <int K> jet<K> cosh(const jet<K>& x) { const double c = std::cosh(x.value); return x.chain(c, std::sinh(x.value), c); }
template <int K> jet<K> tanh(const jet<K>& x) {
    const double f = std::tanh(x.value), c = 1 / std::cosh(x.value), d = c * c;
    return x.chain(f, d, -2 * f * d);
}
template <int K> jet<K> asin(const jet<K>& x) {
    const double r = 1 / ((1 - x.value) * (1 + x.value)), d = std::sqrt(r);
    return x.chain(std::asin(x.value), d, x.value * d * r);
}
template <int K> jet<K> acos(const jet<K>& x) {
    const double r = 1 / ((1 - x.value) * (1 + x.value)), d = std::sqrt(r);
    return x.chain(std::acos(x.value), -d, -x.value * d * r);
}
template <int K> jet<K> atan(const jet<K>& x) {
    const double d = 1 / (1 + x.value * x.value);
    return x.chain(std::atan(x.value), d, -2 * x.value * d * d);
}
template <int K> jet<K> erf(const jet<K>& x) {
    const double d = 1.1283791670955126 * std::exp(-x.value * x.value);
    return x.chain(std::erf(x.value), d, -2 * x.value * d);
}
template <int K> jet<K> pow(const jet<K>& x, double p) {
    const double a = p == 0 ? 0 : p * std::pow(x.value, p - 1);
    const double b = p == 0 || p == 1 ? 0 : p * (p - 1) * std::pow(x.value, p - 2);
    return x.chain(std::pow(x.value, p), a, b);
}
template <int K> jet<K> pow(const jet<K>& x, const jet<K>& y) { return exp(y * log(x)); }
template <int K> jet<K> atan2(const jet<K>& y, const jet<K>& x) {
    // the angle itself, with the derivatives of a quotient that is not too large
    jet<K> a = std::fabs(x.value) >= std::fabs(y.value) ? atan(y / x) : -atan(x / y);
    a.value = std::atan2(y.value, x.value);
    return a;
}
template <int K> jet<K> fabs(const jet<K>& x) { return std::signbit(x.value) ? -x : x; }
template <int K> jet<K> abs(const jet<K>& x) { return fabs(x); }
template <int K> jet<K> fmax(const jet<K>& x, const jet<K>& y) { return x.value >= y.value || y.value != y.value ? x : y; }
template <int K> jet<K> fmin(const jet<K>& x, const jet<K>& y) { return x.value <= y.value || y.value != y.value ? x : y; }

// d f(x + t v) / dt of a function of n numbers
template <class F>
double along(const double* x, const double* v, int n, F f) {
    std::vector<jet<1>> y(x, x + n);
    for (int i = 0; i < n; ++i) y[i].first[0] = v[i];
    return f(static_cast<const jet<1>*>(y.data())).first[0];
}

// d2 f(x + s v + t w) / ds dt
template <class F>
double along2(const double* x, const double* v, const double* w, int n, F f) {
    std::vector<jet<2>> y(x, x + n);
    for (int i = 0; i < n; ++i) {
        y[i].first[0] = v[i];
        y[i].first[1] = w[i];
    }
    return f(static_cast<const jet<2>*>(y.data())).second(0, 1);
}

}  // namespace jetplane

#endif
