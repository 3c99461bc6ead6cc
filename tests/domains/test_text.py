import pytest

from shenhong.domains.text import TextSettings, fault

SETTINGS = TextSettings(paths=["x"], min_characters=20, max_characters=500)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        ("too short", "shorter than min_characters"),
        ("long " * 200, "longer than max_characters"),
        ("a damaged \ufffd text of some length", "damaged characters (U+FFFD)"),
        ("=*=*=*=*=*=*=*=*=*= a *=*=*=*=", "mostly symbols (max_symbol_share)"),
        ("the same line again\n" * 10, "mostly repeated lines (max_repeated_share)"),
        ("An ordinary sentence, with marks; and more.", None),
        ("सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता प्राप्त है।", None),
        ("มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ", None),
        ("មនុស្សទាំងអស់កើតមកមានសេរីភាពនិងភាពស្មើៗគ្នា។ ក្នុងសេចក្ដីថ្លៃថ្នូរនិងសិទ្ធិ", None),
        ("လူတိုင်းသည် တူညီ လွတ်လပ်သော ဂုဏ်သိက္ခာဖြင့် လည်းကောင်း၊ မွေးဖွားလာသူများ ဖြစ်သည်။", None),
        ("بِسْمِ ٱللَّهِ ٱلرَّحْمَٰنِ ٱلرَّحِيمِ ٱلْحَمْدُ لِلَّهِ رَبِّ ٱلْعَٰلَمِينَ", None),
        ("בְּרֵאשִׁית בָּרָא אֱלֹהִים אֵת הַשָּׁמַיִם וְאֵת הָאָרֶץ׃", None),
        ("འགྲོ་བ་མི་རིགས་ཡོངས་ལ་སྐྱེས་ཙམ་ཉིད་ནས་ཆེ་མཐོངས་དང༌།", None),
        ("می‌خواهم نامه‌ای بنویسم که هم‌اکنون می‌رود، آیا می‌دانید؟", None),
        ("🙂🙃😉😊😇🥰😍🤩😘 smile 😗☺😚😙🥲😋😛", "mostly symbols (max_symbol_share)"),
        ("│ a │ b │\n├───┼───┤\n│ 1 │ 2 │\n└───┴───┘", "mostly symbols (max_symbol_share)"),
        ("白日依山尽，黄河入海流。欲穷千里目，更上一层楼。", None),
    ],
)
def test_each_rule_names_its_reason(text, reason):
    assert fault(text, SETTINGS) == reason
