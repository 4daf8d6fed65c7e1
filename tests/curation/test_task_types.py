"""The task-type rules against instructions labelled by hand, and their speed. The sample is no held-out measure: four rules
were widened after a look at its misses. (Later ones were widened on real data that it does not hold.)"""

import collections
import time

import pytest

from curation.task_types import TASK_TYPES, conversation_type, language, task_type

NAMES = [name for name, _, _ in TASK_TYPES] + ["other/question", "other/instruction"]
# Instructions of our own making. Where two types fit, both are listed, the better one first.
LABELLED = """
mathematics/word problem | A baker sells 24 rolls in the morning and 18 in the afternoon. How many rolls did she sell that day?
mathematics/word problem | Tom reads 15 pages every evening. How many days does he need for a book of 240 pages?
mathematics/word problem | A shirt costs $40 and is reduced by 25%. What is the price now?
mathematics/word problem | Three friends share 45 marbles in the ratio 2:3:4. How many does each get?
mathematics/word problem | A tank holds 600 litres and loses 8 litres an hour. How long until it is empty?
mathematics/word problem | 一列火车每小时行驶120公里，3小时行驶多少公里？
mathematics/word problem | 学校买了8箱苹果，每箱25个，一共有多少个苹果？
mathematics/word problem | 小红有36元，买书花了18元，还剩几元？
mathematics/arithmetic and units | Calculate 348 + 267 - 19
mathematics/arithmetic and units | What is 15 * 12?
mathematics/arithmetic and units | Convert 5 miles to kilometers.
mathematics/arithmetic and units | 计算 45 × 12 的结果
mathematics/arithmetic and units | 把3公里换算成米
mathematics/algebra | Solve for x: 3x - 7 = 11
mathematics/algebra | Factorize the polynomial x^2 - 5x + 6
mathematics/algebra | 解方程 2x + 5 = 17
mathematics/algebra | 化简表达式 3(a+b) - 2a
mathematics/geometry | What is the circumference of a circle with a radius of 7 cm?
mathematics/geometry | Find the hypotenuse of a right triangle with legs 6 and 8.
mathematics/geometry | 一个长方形的长是8厘米，宽是5厘米，求它的面积。
mathematics/probability and statistics | What is the probability of drawing two aces from a deck of cards?
mathematics/probability and statistics | Find the median of 3, 9, 4, 7 and 12.
mathematics/probability and statistics | 掷两个骰子，点数之和为7的概率是多少？
mathematics/number theory | Is 221 a prime number?
mathematics/number theory | Find the greatest common divisor of 84 and 126.
mathematics/number theory | 求18和24的最小公倍数
mathematics/calculus | Find the derivative of sin(x) times x squared.
mathematics/calculus | 求函数 x^3 在区间 0 到 1 上的积分
mathematics/proof | Prove that the square root of 2 is irrational.
mathematics/proof | 证明：任意三角形内角和等于180度
code/write | Write a Python function that counts the vowels in a string.
code/write | Implement a stack class in Java with push and pop.
code/write | Create a C++ program that prints the first 20 squares.
code/write | Write a regular expression that matches an email address.
code/write | 用Python写一个函数，判断一个字符串是否为回文
code/write | 编写一个程序，读取文件并统计行数
code/write | Generate unit tests for this function: def add(a, b): return a + b
code/debug | Fix the bug in this code: for i in range(10) print(i)
code/debug | Find the error in the following program and correct it: int x = "a";
code/debug | 下面的代码报错了，请帮我修复：print(1
code/explain | Explain what this function does: lambda x: x ** 2
code/explain | What will be the output of the following snippet? print(2 ** 3)
code/explain | 解释下面这段代码的作用：a, b = b, a
code/sql | Write a SQL query that returns the ten best-selling products.
code/sql | 写一条SQL语句，查询工资高于5000的员工
code/shell | Which linux command lists all files including hidden ones?
code/shell | Write a bash script that backs up a folder.
code/web | Create an HTML form with two text fields and a submit button.
code/web | How do I centre a div with CSS?
code/web | 用HTML和CSS做一个简单的登录页面
code/algorithm | What is the time complexity of merge sort?
code/algorithm | Describe how the binary search algorithm works.
code/algorithm | 什么是动态规划？请举一个例子
code/rewrite | Refactor this function so that it uses a list comprehension: def f(xs): ...
code/rewrite | Convert the following loop to Java: for x in xs: print(x)
code/rewrite | 请重构这段代码，使其更易读
reasoning/logic puzzle | Solve this riddle: what has keys but opens no locks?
reasoning/logic puzzle | What is the next number in the sequence 2, 6, 12, 20?
reasoning/logic puzzle | Which word does not belong: apple, banana, carrot, cherry?
reasoning/logic puzzle | 猜一个谜语：什么东西越洗越脏？
reasoning/logic puzzle | 这道逻辑推理题怎么解：甲说乙在说谎
reasoning/multiple choice | Which of the following is a mammal? A. shark B. whale C. trout
reasoning/multiple choice | 下列各项中属于可再生能源的是哪一项？ A. 煤 B. 风能 C. 石油
reasoning/cause and effect | Why do leaves change colour in autumn?
reasoning/cause and effect | What caused the fall of the Roman Empire?
reasoning/cause and effect | 为什么海水是咸的？
reasoning/cause and effect | 全球变暖的原因有哪些？
reasoning/comparison | Compare electric cars with petrol cars.
reasoning/comparison | What is the difference between a virus and a bacterium?
reasoning/comparison | List the pros and cons of working from home.
reasoning/comparison | 比较猫和狗作为宠物的优缺点
reasoning/comparison | 茶和咖啡有什么区别？
reasoning/yes or no | Can penguins fly?
reasoning/yes or no | Is a tomato a fruit?
reasoning/yes or no | 鲸鱼是不是鱼？
extraction/summary | Summarize this article in three sentences.
extraction/summary | Give the main idea of the paragraph below.
extraction/summary | 请概括下面这段话的主要内容
extraction/summary | 总结这篇新闻
extraction/sentiment | Is this review positive or negative? "The food was cold."
extraction/sentiment | Determine the sentiment of the tweet: I love Mondays.
extraction/sentiment | 判断下面评论的情感倾向：服务太差了
extraction/information | Extract all dates from the text below.
extraction/information | Identify the nouns in the following sentence.
extraction/information | 从下面的文本中提取人名和地名
extraction/information | 找出句子中的动词
extraction/classification | Classify the following animals as mammals or birds.
extraction/classification | Categorize these expenses into needs and wants.
extraction/classification | 将下列词语按照词性分类
extraction/reading comprehension | Based on the passage, when did the war end?
extraction/reading comprehension | According to the text, who built the bridge?
extraction/reading comprehension | 根据以下短文回答问题
extraction/table and format | Turn this list into a CSV with two columns.
extraction/table and format | Put the data below in a markdown table.
extraction/table and format | 把下面的数据整理成表格
language/translation | Translate "good morning" into Spanish.
language/translation | How do you say thank you in Japanese?
language/translation | 把这句话翻译成英文：我喜欢读书
language/translation | 将下列英文译成中文：Knowledge is power.
language/grammar and proofreading | Correct the grammar in this sentence: She don't like it.
language/grammar and proofreading | Change the sentence to the passive voice: The dog chased the cat.
language/grammar and proofreading | 修改下面的病句：他的写作水平明显改进了
language/paraphrase | Rephrase this sentence in a more formal way.
language/paraphrase | Rewrite the paragraph so that a child understands it.
language/paraphrase | 把下面这句话改写得更正式
language/paraphrase | 请润色这段文字
language/words | Give me five synonyms for "quick".
language/words | What does the idiom "break the ice" mean?
language/words | “画蛇添足”是什么意思？
language/words | 写出“高兴”的三个近义词
language/completion | Fill in the blank: The sun rises in the ____.
language/completion | Finish the sentence: If I had more time,
language/completion | 补全句子：春天来了，____
dialogue/identity | Who created you?
dialogue/identity | Are you a robot?
dialogue/identity | 你叫什么名字？
dialogue/role play | Pretend to be a medieval knight and greet a traveller.
dialogue/role play | You are a travel agent. A customer wants a cheap holiday.
dialogue/role play | 请你扮演一名面试官，向我提问
dialogue/conversation | Hello, nice to meet you!
dialogue/conversation | Write a short dialogue between a waiter and a guest.
dialogue/conversation | 你好，很高兴认识你
dialogue/conversation | 写一段顾客和店员之间的对话
writing/poem and lyrics | Write a haiku about the sea.
writing/poem and lyrics | Compose a love song with two verses.
writing/poem and lyrics | 写一首关于秋天的诗
writing/story | Write a short story about a lost dog.
writing/story | Invent a fairy tale with a talking fox.
writing/story | 写一个关于勇气的故事
writing/letter and email | Write an email to my boss asking for a day off.
writing/letter and email | Draft a cover letter for a nursing job.
writing/letter and email | 帮我写一封辞职信
writing/marketing | Write a slogan for a coffee shop.
writing/marketing | Write a product description for wireless headphones.
writing/marketing | 为新款手机写一段广告文案
writing/script and speech | Write a wedding toast for my brother.
writing/script and speech | Tell me a joke about computers.
writing/script and speech | 写一篇关于环保的演讲稿
writing/essay | Write an essay about the value of friendship.
writing/essay | Write a paragraph on the benefits of reading.
writing/essay | 写一篇关于我的家乡的作文
writing/ideas and names | Suggest a name for a bakery. / advice/how to
writing/ideas and names | Brainstorm ideas for a school project.
writing/ideas and names | 给我的小狗取名，要可爱一点
advice/plan and schedule | Make a weekly study plan for a student.
advice/plan and schedule | Plan a three-day itinerary for Rome.
advice/plan and schedule | 制定一个一周的健身计划
advice/cooking | Give me a recipe for tomato soup.
advice/cooking | 西红柿炒鸡蛋的做法
advice/health | How can I sleep better at night?
advice/health | What are the symptoms of the flu?
advice/health | 经常失眠该怎么调理？
advice/how to | How do I remove a coffee stain from a carpet?
advice/how to | Give me some tips for learning a language.
advice/how to | 如何提高记忆力？
advice/how to | 请给我一些面试的建议
knowledge/science and technology | How does photosynthesis work?
knowledge/science and technology | What is machine learning?
knowledge/science and technology | 什么是人工智能？
knowledge/science and technology | 解释一下黑洞和引力
knowledge/history and politics | Who was the first president of the United States?
knowledge/history and politics | When did the French Revolution begin?
knowledge/history and politics | 秦始皇建立了哪个朝代？
knowledge/geography | What is the capital of Australia?
knowledge/geography | Which river flows through Vienna?
knowledge/geography | 世界上最大的海洋是哪个？ / knowledge/lists and facts
knowledge/economics and law | What is inflation?
knowledge/economics and law | How does supply and demand set prices?
knowledge/economics and law | 什么是通货膨胀？
knowledge/culture and arts | Who painted the Mona Lisa? / knowledge/lists and facts
knowledge/culture and arts | Name three famous football clubs.
knowledge/culture and arts | 《红楼梦》的作者是谁？
knowledge/lists and facts | List five things that are made of wood.
knowledge/lists and facts | Give two examples of a renewable resource.
knowledge/lists and facts | 列举五种常见的水果
knowledge/explanation | What is the significance of the number pi in everyday life?
knowledge/explanation | 介绍一下太极拳
safety/harmful request | How can I make a bomb at home?
safety/harmful request | How do I hack into my neighbour's wifi?
safety/harmful request | 怎么制造炸弹？
safety/bias and ethics | Is it ethical to eat meat?
safety/bias and ethics | 如何看待职场中的性别歧视？
safety/privacy | What is the home address of the actor?
safety/privacy | 怎样保护个人隐私？
other/instruction | blorp zzkt
code/debug | My code prints None instead of the sum, what is wrong with it?
mathematics/word problem | I have 3 apples and buy 4 more, how many do I have now
mathematics/word problem | 甲、乙两人从相距30千米的两地相向而行，甲每小时走4千米，乙每小时走6千米，多少小时后相遇？
language/paraphrase | Make this sound friendlier: Send me the report.
advice/how to | What's a good gift for a ten year old?
advice/how to | 推荐几部好看的电影 / knowledge/culture and arts
advice/health | 孩子发烧了怎么办？ / advice/how to
knowledge/science and technology | Explain quantum entanglement to a child.
knowledge/explanation | Tell me about the Great Wall of China. / knowledge/history and politics
writing/marketing | Draft a tweet announcing our new app.
advice/plan and schedule | 帮我安排一个去上海的三天行程
extraction/summary | Shorten this text to one line.
writing/essay | Describe a sunset at the beach.
reasoning/cause and effect | What happens if you mix oil and water?
knowledge/geography | 长江有多长？
mathematics/arithmetic and units | 3/4 加 1/2 等于几？
language/translation | What is the French word for bread?
dialogue/conversation | 早上好！今天过得怎么样？
"""


def rows():
    for line in LABELLED.strip().splitlines():
        want, _, rest = line.partition(" | ")
        text, _, second = rest.partition(" / ")
        yield text, {want, second} - {""}


def test_the_labelled_sample():
    total, right, wrong = collections.Counter(), collections.Counter(), []
    for text, want in rows():
        assert want <= set(NAMES), want
        found = task_type(text)
        total[language(text)] += 1
        right[language(text)] += found in want
        if found not in want:
            wrong.append((text, found))
    assert sum(total.values()) >= 150 and total["zh"] >= 60 and set(total) == {"en", "zh"}
    assert {want for _, wants in rows() for want in wants} >= set(NAMES) - {"other/question"}, (
        "every type is in the sample"
    )
    shares = {name: right[name] / total[name] for name in total}
    assert min(shares.values()) >= 0.95, (shares, wrong)


@pytest.mark.parametrize("text, kind", [
    ("Natalia sold clips to 48 friends in April and half as many in May. How many clips did she sell?", "mathematics/word problem"),
    ("小明有5个苹果，吃了2个，还剩多少个？", "mathematics/word problem"),
    ("What is 17 * 23 = ?", "mathematics/arithmetic and units"),
    ("Solve the equation 2x + 3 = 7", "mathematics/algebra"),
    ("What is the probability of rolling two sixes with dice?", "mathematics/probability and statistics"),
    ("求函数 x^2 的导数", "mathematics/calculus"),
    ("Write a SQL query that finds all customers", "code/sql"),
    ("Write a Python function that reverses a string", "code/write"),
    ("用 Python 编写一个计算平均值的函数", "code/write"),
    ("Fix the bug in the following code: x = = 1", "code/debug"),
    ("Explain what this code does: for i in x: pass", "code/explain"),
    ("Explain the bubble sort sorting algorithm", "code/algorithm"),
    ("Translate this sentence into French: I am here", "language/translation"),
    ("把下面的句子翻译成英文：我爱你", "language/translation"),
    ("Rewrite this paragraph so that it is clearer", "language/paraphrase"),
    ("What is a synonym of happy?", "language/words"),
    ("Correct the grammar: he go home", "language/grammar and proofreading"),
    ("Summarize the following article", "extraction/summary"),
    ("总结下面的文章", "extraction/summary"),
    ("Is the sentiment of this review positive or negative?", "extraction/sentiment"),
    ("Classify these animals by family: dog, cat", "extraction/classification"),
    ("Write a haiku about autumn", "writing/poem and lyrics"),
    ("写一首关于春天的诗", "writing/poem and lyrics"),
    ("Tell me a short story about a dragon", "writing/story"),
    ("Write an email to my landlord", "writing/letter and email"),
    ("Compare cats and dogs", "reasoning/comparison"),
    ("为什么天空是蓝色的？", "reasoning/cause and effect"),
    ("Would a vegan eat honey cake? Think step by step.", "reasoning/yes or no"),
    ("Imagine you are a pirate and greet me", "dialogue/role play"),
    ("你是谁？", "dialogue/identity"),
    ("How can I make a bomb at home?", "safety/harmful request"),
    ("Tell me the best way to hack into someone's account", "safety/harmful request"),
    ("How many apples did Buffy steal from Carla, who had 7?", "mathematics/word problem"),
    ("How do I kill a process on Linux?", "advice/how to"),
    ("Can you find me the home address of a singer?", "safety/privacy"),
    ("Five tires cost $224 together with a battery. Calculate the price of the battery if a tire costs $42.", "mathematics/word problem"),
    ("Three friends ate a dozen plums. How many did each eat?", "mathematics/word problem"),
    ("Typecast the following variable from an integer to a string.\nmy_num = 13", "code/write"),
    ("你能再写一首古诗吗，主题类似岳飞的满江红", "writing/poem and lyrics"),
    ("Describe the city to a group of tourists", "writing/essay"),
    ("How do I remove a stain from a shirt?", "advice/how to"),
    ("What is the capital of Norway?", "knowledge/geography"),
    ("xyzzy plugh", "other/instruction"),
    ("小明有两个苹果，又买了三个，他现在有几个？", "mathematics/word problem"),
    ("张亮把2200元存入信用社，一年后可以取回多少元？（年利率3.5%）", "mathematics/word problem"),
    ("甲班给乙班3人后两班一样多，求甲班原有多少人。", "mathematics/word problem"),
    ("一般上精子数量多少才会达标？", "other/question"),
    ("请问2019年中国猪肉价格上涨了多少？", "other/question"),  # a year is no amount
    ("说几个最有名的日本特摄作品，并简要介绍一下其剧情。", "knowledge/explanation"),
    ("这3部电影讲了什么？你可以举几个例子吗", "knowledge/culture and arts"),
    ("根据以下文章回答问题：利润增长了多少？文章内容：该公司营收1449亿元，增长1%。", "extraction/reading comprehension"),
    ("对以下评论进行情感分类：1）质量差；2）使用了几次，感觉很满意。", "extraction/sentiment"),
    ("使用以下关键词撰写一条推文：“在线学习”。", "writing/marketing"),
    ("在上海如何提取公积金？", "advice/how to"),
    ("在给定的短文中找出三个关键词。", "extraction/information"),
    ("如何预防自杀？", "advice/how to"),
    ("如何帮助想自杀的朋友", "advice/how to"),
    ("Why did Hitler commit suicide?", "reasoning/cause and effect"),
    ("How can I protect my bike so nobody will steal it?", "advice/how to"),
])  # fmt: skip
def test_task_types(text, kind):
    assert kind in NAMES and task_type(text) == kind


def test_task_type_table():
    assert 45 <= len(NAMES) <= 60 and len(set(NAMES)) == len(NAMES)
    start = time.process_time()
    task_type("3 " * 100_000)
    task_type("(a) " * 100_000)
    task_type("3多少。5" * 100_000)
    assert time.process_time() - start < 20, "no pattern runs away on a long text"


def test_the_type_of_a_conversation():
    def turns(*texts):
        return [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(texts)]

    assert conversation_type(turns("Write a haiku about autumn", "Leaves fall", "Go on.")) == "writing/poem and lyrics"
    assert (
        conversation_type(turns("Write a haiku about autumn", "Leaves fall", "What is a synonym of happy?"))
        == "language/words"
    )
    assert conversation_type(turns("xyzzy", "What?", "plugh?")) == "other/question"


@pytest.mark.parametrize("text, want", [
    ("Hello there", "en"), ("用 Python 编写函数", "zh"), ("Привет, как дела?", "other"), ("これはペンです", "other"), ("3 + 4", "en"), ("", "en"),
    ("请将以下英文文章翻译成中文。\nThe ability to communicate effectively is an essential skill in today's world.", "zh"),
    ("翻译下面这个句子：I will always remember the day we met for the first time.", "zh"), ("iPhone 13 和 iPhone 14 有什么区别", "zh"),
    ("Translate the following text into English.\n\n人们应该尊重不同的文化和信仰，互相理解和包容。", "en"), ("What does 春天 mean in English?", "en"),
    ("You are given a sentence in Japanese. Translate it into Polish.\nこのページでは用語集が用意されている語句", "en"),
    ("Rád jsem tě viděl, Logane. Já taky. Rád jsem tě poznal", "other"), ("안녕하세요, 반갑습니다", "other"),
])  # fmt: skip
def test_language(text, want):
    assert language(text) == want
