r"""What counts as the answer: completions, answers, and the scores of `numeric_match` and `math_match`.

Each line of a table: completion | answer | score of numeric_match | score of math_match; `\n` is a line end.
A `-` instead of a score: the answer is refused, because it holds no number.
"""

WHERE = r"""
42 | 42 | 1 | 1
The answer is 42. | 42 | 1 | 1
The answer is 42\nStep 3 is done | 42 | 1 | 1
The answer is 42\nStep 3 is done | 3 | 0 | 0
The answer is:\n42 | 42 | 1 | 1
**Answer:** 42 | 42 | 1 | 1
Answer: **42** | 42 | 1 | 1
Final answer = 42 | 42 | 1 | 1
The answer to the second question is 42, I think. | 42 | 1 | 1
The answer is 3. No, the answer is 4. | 4 | 1 | 1
The answer is 3. No, the answer is 4. | 3 | 0 | 0
We have 3 and 4, so 12. | 12 | 1 | 1
We have 3 and 4, so 12. | 3 | 0 | 0
3 + 5 = 8 | 8 | 1 | 1
3 + 5 = 8. | 8 | 1 | 1
so x = 8 | 8 | 1 | 1
It is 8! | 8 | 1 | 1
(8) | 8 | 1 | 1
*8* | 8 | 1 | 1
**8** | 8 | 1 | 1
$8$ | 8 | 1 | 1
`8` | 8 | 1 | 1
#### 72 | 72 | 1 | 1
48/2 = 24\n48+24 = 72\n#### 72 | 72 | 1 | 1
#### 72\nThat was step 5 | 72 | 1 | 1
#### 3\n#### 4 | 4 | 1 | 1
\boxed{7} | 7 | 1 | 1
First 3, then 4. \boxed{7} So 9. | 7 | 1 | 1
First 3, then 4. \boxed{7} So 9. | 9 | 0 | 0
$\boxed{7}$ | 7 | 1 | 1
\boxed{x = 7} | 7 | 1 | 1
\boxed{\text{7 apples}} | 7 | 1 | 1
\fbox{7} | 7 | 1 | 1
\boxed 7 | 7 | 1 | 1
\boxed{3} or \boxed{4} | 4 | 1 | 1
\boxed{3} or \boxed{4} | 3 | 0 | 0
\boxed{4} wait \boxed{ | 4 | 0 | 0
\boxed{4 | 4 | 0 | 0
\boxed{} | 4 | 0 | 0
\boxed{\frac{1}{2}} | 1/2 | 1 | 1
<think>\boxed{1}</think> It is 5 | 5 | 1 | 1
<think>\boxed{1}</think> It is 5 | 1 | 0 | 0
<think>so 5</think> | 5 | 0 | 0
so 5</think>\n6 | 6 | 1 | 1
<think>3</think><answer>8</answer> | 8 | 1 | 1
<answer>8</answer> as 3 + 5 = 9 | 8 | 1 | 1
<answer>\boxed{8}</answer> | 8 | 1 | 1
Options 1, 2 or 3: it is 2 | 2 | 1 | 1
none at all | 8 | 0 | 0
| 8 | 0 | 0
8 | #### 8 | 1 | 1
8 | 3 + 5 = 8\n#### 8 | 1 | 1
8 | \boxed{8} | 1 | 1
8 | $8$ | 1 | 1
8 | eight | - | 0
"""

NUMBERS = r"""
007 | 7 | 1 | 1
7.0 | 7 | 1 | 1
7. | 7 | 1 | 1
.5 | 0.5 | 1 | 1
0.5 | .5 | 1 | 1
0.1 | 1/10 | 1 | 1
0.10 | 0.1 | 1 | 1
0.3 | 0.30000000000000004 | 0 | 1
0.3333333 | 1/3 | 0 | 1
0.33 | 1/3 | 0 | 0
12345678901234567890123 | 12345678901234567890123 | 1 | 1
12345678901234567890123 | 12345678901234567890124 | 0 | 0
+5 | 5 | 1 | 1
-7 | -7 | 1 | 1
7 | -7 | 0 | 0
-7 | 7 | 0 | 0
x = - 7 | -7 | 1 | 1
x = -7 | -7 | 1 | 1
The answer is - 7 | -7 | 1 | 1
it is -7 | -7 | 1 | 1
(-7) | -7 | 1 | 1
− 7 | -7 | 1 | 1
x = −12 | -12 | 1 | 1
**-12** | -12 | 1 | 1
Points:\n- 7 | 7 | 1 | 1
1,234 | 1234 | 1 | 1
1,234,567.89 | 1234567.89 | 1 | 1
-1,234.50 | -1234.5 | 1 | 1
1 234 | 1234 | 1 | 1
1 234 567 | 1234567 | 1 | 1
1{,}234 | 1234 | 1 | 1
1\,234 | 1234 | 1 | 1
1.234,5 | 1234.5 | 1 | 1
1.234.567,5 | 1234567.5 | 1 | 1
1.234 | 1.234 | 1 | 1
1.234 | 1234 | 0 | 0
1,23 | 1.23 | 0 | 0
It has 1,234 | 234 | 0 | 0
1e5 | 100000 | 1 | 1
5 | 1e5 | 0 | 0
1E5 | 100000 | 1 | 1
It is 1.5e-3. | 0.0015 | 1 | 1
3 | 1.5e-3 | 0 | 0
-2e3 | -2000 | 1 | 1
1.5 x 10^3 | 1500 | 1 | 1
1.5 × 10^{-3} | 0.0015 | 1 | 1
$1.5 \times 10^{3}$ | 1500 | 1 | 1
1.5 \cdot 10^{3} | 1500 | 1 | 1
3 | 1.5 \times 10^{3} | 0 | 0
1e5 apples | 100000 | 1 | 1
1e999999999 | 5 | 0 | 0
2^10 | 2^10 | 1 | 1
2^10 | 1024 | 1 | 1
10 | 2^10 | 0 | 0
10 | 1024 | 0 | 0
2^{10} | 1024 | 1 | 1
2**10 | 1024 | 1 | 1
10² | 100 | 1 | 1
10² | 10 | 0 | 0
10^-2 | 0.01 | 1 | 1
3/4 | 3/4 | 1 | 1
so 3/4 | 0.75 | 1 | 1
4 | 3/4 | 0 | 0
3 | 3/4 | 0 | 0
6/8 | 3/4 | 1 | 1
-3/4 | -0.75 | 1 | 1
1/2 | 2 | 0 | 0
1/2 | 1 | 0 | 0
1/2 | 0.5 | 1 | 1
\frac{3}{4} | 3/4 | 1 | 1
$\frac{3}{4}$ | 0.75 | 1 | 1
\dfrac{3}{4} | 0.75 | 1 | 1
\tfrac34 | 0.75 | 1 | 1
-\frac{1}{2} | -0.5 | 1 | 1
\frac{-1}{2} | -0.5 | 1 | 1
4 | \frac{3}{4} | 0 | 0
3/4 | \frac{3}{4} | 1 | 1
1 1/2 | 1.5 | 1 | 1
1\frac{1}{2} | 3/2 | 1 | 1
½ | 0.5 | 1 | 1
1½ | 1.5 | 1 | 1
1/0 | 0 | 0 | 0
50% | 50% | 1 | 1
50 % | 50% | 1 | 1
50\% | 50% | 1 | 1
50% | 50 | 1 | 1
50% | 0.5 | 1 | 1
0.5 | 50% | 1 | 1
50 | 50% | 1 | 1
50 percent | 50% | 1 | 1
5000% | 50% | 0 | 0
0.5% | 50% | 0 | 0
12.5% | 1/8 | 1 | 1
$5.00 | 5 | 1 | 1
It costs $1,234. | 1234 | 1 | 1
-$5 | -5 | 1 | 1
€5 | 5 | 1 | 1
5 dollars | 5 | 1 | 1
5 kg | 5 | 1 | 1
5kg | 5 | 1 | 1
5 m | 5 kg | 1 | 1
5 | 5 km | 1 | 1
5\text{ cm} | 5 | 1 | 1
90° | 90 | 1 | 1
90^\circ | 90 | 1 | 1
42 apples | 42 | 1 | 1
42元 | 42 | 1 | 1
a 5-year plan | 5 | 1 | 1
٣ | 3 | 1 | 1
１２ | 12 | 1 | 1
"""  # noqa: RUF001

NO_NUMBERS = r"""
0 + 2 | 2 | 0 | 1
2 + 0 | 2 | 0 | 1
The answer is 0 + 2 | 2 | 0 | 1
10 - 7 | 7 | 0 | 0
10 - 7 | 3 | 0 | 1
10-7 | 7 | 0 | 0
10 -7 | 7 | 0 | 0
(2)-5 | 5 | 0 | 0
x - 7 | 7 | 0 | 0
x - 7 | -7 | 0 | 0
3 * 4 | 4 | 0 | 0
3*4 | 4 | 0 | 0
3 × 4 | 4 | 0 | 0
$3 \times 4$ | 4 | 0 | 0
$3 \cdot 4$ | 12 | 0 | 1
6 ÷ 2 | 2 | 0 | 0
2x | 2 | 0 | 0
2\pi | 2 | 0 | 0
2π | 2 | 0 | 0
x^2 | 2 | 0 | 0
$x_3$ | 3 | 0 | 0
f(5) | 5 | 0 | 0
2(5) | 5 | 0 | 0
$\sqrt{2}$ | 2 | 0 | 0
$\sqrt{4}$ | 2 | 0 | 1
2 | $\sqrt{4}$ | - | 1
$x+1$ | $1+x$ | - | 1
$\{2, 1\}$ | $\{1, 2\}$ | 0 | 1
2\sqrt{3} | 3 | 0 | 0
±3 | 3 | 0 | 0
$\pm 3$ | 3 | 0 | 0
40 + | 40 | 0 | 0
40 - | 40 | 0 | 0
40 / | 40 | 0 | 0
3/4/2021 | 2021 | 0 | 0
1/2/3 | 3 | 0 | 0
9^9^9^9 | 9 | 0 | 0
H2O | 2 | 0 | 0
v2 | 2 | 0 | 0
GPT-4 | 4 | 0 | 0
3 in H2O | 3 | 1 | 1
1.2.3 | 3 | 0 | 0
1, 2, 3 | 1, 2, 3 | 1 | 1
1,2,3 | 1, 2, 3 | 1 | 1
3,2,1 | 1, 2, 3 | 0 | 0
1, 2, 3 | 3 | 0 | 0
1,2,3 | 3 | 0 | 0
They are 1, 2 and 3 | 1, 2 and 3 | 1 | 1
\boxed{1, 2} | 1,2 | 1 | 1
\boxed{(1, 2)} | (1, 2) | 1 | 1
\boxed{1, 2} | 2 | 0 | 0
12:30 | 12:30 | 1 | 1
It is 12:30 | 12:30 | 1 | 1
30 | 12:30 | 0 | 0
12 | 12:30 | 0 | 0
12:30 | 30 | 0 | 0
3:4 | 3:4 | 1 | 1
None | 0 | 0 | 0
"""  # noqa: RUF001


def rows() -> list[tuple[str, str, float | None, float]]:
    """Completion, answer, and the two scores; None where numeric_match refuses the answer."""
    made: list[tuple[str, str, float | None, float]] = []
    for line in f"{WHERE}{NUMBERS}{NO_NUMBERS}".splitlines():
        if line:
            cells = (cell.strip(" ").replace("\\n", "\n") for cell in line.split("|"))
            completion, answer, numeric, equal = cells
            made.append((completion, answer, None if numeric == "-" else float(numeric), float(equal)))
    return made
